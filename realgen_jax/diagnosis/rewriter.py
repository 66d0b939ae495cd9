"""Checks of runs that train the rewriter: signal, KL, lengths, repeated words and exactness."""

from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, NotRecorded, span

# Share of the reward's variance that is between rewrites of a prompt. Below it, eight rewrites with
# a picture each tell good words from bad ones no better than chance.
LITTLE_SIGNAL = 0.05

# Nats per token between the policy and the language model it started from.
FAR = 1.0

# Share of rewrites that end with the same word. 19 % of RealBench's long prompts hold the same
# camera file name.
SAME_TAIL = 0.3

# Share of tokens that replay would not have drawn: 0 in float32, 1.3 % in bfloat16 (random weights,
# 8 layers).
MANY_FLIPS = 0.02

# Share of the allowed words at which a length counts as at its bound.
AT_BOUND = 0.97


def signal(metrics: Metrics, config: dict) -> Finding | None:
    """Check that rewrites of a prompt differ in reward by more than pictures of a rewrite do."""
    epochs, shares = metrics.series("signal/rewrites", "eval")
    share = float(shares[-1])
    figures = [
        Figure("reward's variance between rewrites", share, f">= {LITTLE_SIGNAL:g}", span(epochs))
    ]
    if share >= LITTLE_SIGNAL or metrics.improves:
        return Finding("signal", FINE, figures)
    says = (
        f"Only {share:.1%} of the reward's variance is between rewrites of a prompt, the rest is "
        "chance of the pictures, so there is next to nothing to learn from."
    )
    settings = config["rewriter"]
    remedy = (
        f"More pictures of each rewrite, --config.rewriter.images_per_rewrite="
        f"{2 * settings['images_per_rewrite']}, the same noise for all rewrites, "
        "--config.sample.same_latent=True, or a higher --config.rewriter.temperature."
    )
    return Finding("signal", PROBLEM, figures, says, remedy)


def far_away(metrics: Metrics, config: dict) -> Finding | None:
    """Check that the policy does not run away from its start without a gain."""
    if not metrics.records("kl"):
        return None
    distance = metrics.recent("kl")
    figures = [
        Figure("KL to the start, nats a token", distance, f"<= {FAR:g}", metrics.recent_epochs)
    ]
    if distance <= FAR or metrics.improves:
        return Finding("KL of the rewriter", FINE, figures)
    train = config["train"]
    says = (
        f"The rewriter is {distance:.2g} nats a token away from its start, while the reward does "
        "not rise: it changes its words without a gain."
    )
    remedy = (
        f"--config.train.beta={max(10 * train['beta'], 0.01):g}, or "
        f"--config.train.learning_rate={train['learning_rate'] / 5:.1g}."
    )
    return Finding("KL of the rewriter", PROBLEM, figures, says, remedy)


def lengths(metrics: Metrics, config: dict) -> Finding | None:
    """Check that rewrites are not at the bound of their length."""
    words = metrics.recent("text/words")
    most = config["rewriter"]["max_words"]
    figures = [
        Figure("words of a rewrite", words, f"< {AT_BOUND * most:.0f}", metrics.recent_epochs)
    ]
    if words < AT_BOUND * most:
        return Finding("length", FINE, figures)
    says = (
        f"Rewrites have {words:.0f} words on average, at their bound of {most}: length is "
        "rewarded for itself."
    )
    remedy = (
        "Raise the weight of the length, --config.rewriter.text_rewards.length=1.0, and look at "
        "what the added words say (RUN/rewrites.jsonl)."
    )
    return Finding("length", NOTE, figures, says, remedy)


def same_tail(metrics: Metrics, config: dict) -> Finding | None:
    """Check that rewrites do not all end alike."""
    share = metrics.recent("text/tail")
    _, first = metrics.series("text/tail")
    figures = [
        Figure(
            "rewrites with the commonest last word",
            share,
            f"<= {SAME_TAIL:g}",
            metrics.recent_epochs,
        ),
        Figure("the same at first", float(first[0]), "", "1"),
    ]
    # A language model whose rewrites always ended alike has learned nothing by it.
    if share <= SAME_TAIL or share <= 1.2 * float(first[0]):
        return Finding("last words", FINE, figures[:1])
    says = (
        f"{share:.0%} of the rewrites end with the same word, at first {first[0]:.0%}: every "
        "prompt gets the same suffix."
    )
    remedy = (
        "Add the suffix to --config.rewriter.spam_patterns, with "
        "--config.rewriter.text_rewards.spam=0.5."
    )
    severity = NOTE if metrics.improves else PROBLEM
    return Finding("last words", severity, figures, says, remedy)


def flips(metrics: Metrics, config: dict) -> Finding | None:
    """Check that sampling and replay compute nearly the same probabilities."""
    share = metrics.recent("gap_flips")
    figures = [
        Figure(
            "tokens that replay would not draw", share, f"<= {MANY_FLIPS:g}", metrics.recent_epochs
        )
    ]
    if share <= MANY_FLIPS:
        return Finding("sampler and replay", FINE, figures)
    says = (
        f"With the sampler's own noise, replay would draw {share:.1%} of the tokens differently, "
        "so the rewrites are not those of the policy that is trained."
    )
    remedy = "--config.rewriter.dtype=float32, or keep --config.rewriter.importance_cap above 0."
    return Finding("sampler and replay", NOTE, figures, says, remedy)


def unusable(metrics: Metrics, config: dict) -> Finding | None:
    """Check how many rewrites cannot be drawn."""
    if not metrics.records("text/unusable"):
        raise NotRecorded("train text/unusable")
    share = metrics.recent("text/unusable")
    most = config["rewriter"]["max_unusable"]
    figures = [
        Figure("rewrites that cannot be drawn", share, f"<= {most / 2:g}", metrics.recent_epochs)
    ]
    if share <= most / 2:
        return Finding("unusable rewrites", FINE, figures)
    says = (
        f"{share:.0%} of the rewrites cannot be drawn, and the user's prompt is drawn instead: "
        "these pictures teach the rewriter nothing."
    )
    remedy = (
        "Raise --config.rewriter.max_new_tokens or --config.prompts.max_tokens, or ask for less in "
        "--config.rewriter.system."
    )
    return Finding("unusable rewrites", PROBLEM, figures, says, remedy)
