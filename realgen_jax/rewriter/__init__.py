"""The prompt rewriter: a language model that is trained on the pictures its rewrites give."""
