"""Human preference by HPSv3 (arXiv 2508.03789, MizzenAI/HPSv3), a fine-tuned Qwen2-VL-7B."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from reward_bridge.rewards.qwen_vl import QwenInputs
from reward_bridge.weights import Table, find, load_strict, read, rename, torch_dtype

# The head reads the state of this token, which comes after everything that is judged.
REWARD = "<|Reward|>"
PIXELS = 256 * 28 * 28  # size of every resized picture, up to whole blocks of patches

# The text that the model was trained with, including spaces at the ends of lines.
INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text "
    "Alignment and give a overall score to estimate the human preference. Please provide a "
    "rating from 0 to 10, with 0 being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should "
    "be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or "
    "logical errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be "
    "clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, "
    "and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the "
    "color scheme, composition, atmosphere, depth of field, and the overall creative appeal. "
    "The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality "
    "and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., "
    "person, animal, object) align with the textual description. The subject should match "
    "the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic "
    "style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The "
    "environment should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., "
    "colors, clothing, accessories, expressions, actions) are faithfully represented in the "
    "image. Minor deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt "
    "are captured in the image. The generated content should not introduce elements that "
    "conflict with or distort the original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
)
ENDING = "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"

# The published file has the names of transformers 4.45.
# Later versions put the towers under `model`.
TABLE: Table = (
    (r"rm_head\.(.+)", r"head.\1"),
    (r"lm_head\.weight", None),
    (r"(?:model\.)?visual\.(.+)", r"model.visual.\1"),
    (r"model\.(?:language_model\.)?((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
)


class Hpsv3:
    """The mean of the preference distribution that HPSv3 predicts, divided by `divide_by`.

    path: HPSv3.safetensors or its folder.
    base: a local folder with the config, tokenizer and image processor of Qwen2-VL-7B-Instruct. Its
        weights are not needed, since the HPSv3 file has all weights.
    divide_by: 15 in RealGen's server, 1 in its evaluation.
    """

    can_be_negative = True

    def __init__(
        self,
        device: str,
        path: str,
        base: str,
        divide_by: float = 1.0,
        attention: str = "sdpa",
        dtype: str = "bfloat16",
    ):
        file = find(path, "hpsv3.path", "HPSv3.safetensors", "*.safetensors")
        self.divide_by = divide_by
        self.inputs = QwenInputs(base, "hpsv3.base", (PIXELS, PIXELS))
        self.inputs.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        self.reward_token = self.inputs.tokenizer.convert_tokens_to_ids(REWARD)

        config = Qwen2VLConfig.from_pretrained(self.inputs.folder)
        config.text_config.vocab_size = len(self.inputs.tokenizer)
        with torch.device(device):  # 7 billion parameters: created on their device
            model = Preference(config, torch_dtype(dtype), attention)
        self.model = load_strict(model, rename(read(file), TABLE, file), file)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        texts = [INSTRUCTION.replace("{text_prompt}", prompt) + ENDING for prompt in prompts]
        inputs = self.inputs(images, texts)
        return self.model(**inputs, read_at=self.reward_token)[:, 0] / self.divide_by


class Preference(nn.Module):
    """Qwen2-VL without its language head, and an MLP on the final state of one token.

    It predicts the preference's mean and spread. The authors call the language model with only
    embeddings, so transformers numbers all positions consecutively, including the picture's. The
    model was trained this way, so this class does the same instead of using Qwen2-VL's positions
    (time, row, column).
    """

    def __init__(self, config: Qwen2VLConfig, dtype: torch.dtype, attention: str):
        super().__init__()
        self.model = Qwen2VLModel._from_config(config, dtype=dtype, attn_implementation=attention)
        width = config.text_config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )  # in float32, whatever the model's dtype

    def forward(
        self, input_ids: torch.Tensor, read_at: int, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Token ids [n, length] and their other inputs -> [n, 2], at the token `read_at`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        output = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, **inputs)
        return self.head(output.last_hidden_state[input_ids == read_at].float())
