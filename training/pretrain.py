"""What a pretraining is: a run on plain text, which the receiver learns to repeat and to go on with from a latent.

Source: ARC-Encoder, arXiv:2510.20535, after ICAE, arXiv:2307.06945 §2.2. Importing this module needs no torch.
"""

from typing import ClassVar

from pydantic import field_validator, model_validator

from latentwire.training.config import DATA, MODELS, OBJECTIVES, TrainConfig, absolute

ANSWERING = (
    "task", "answer_weight", "first_token_weight", "first_k", "first_k_weight", "kd_weight", "kd_chunk",
    "margin_weight", "margin", "diversity_weight", "source_text", "sources_per_example", "metric",
    "debug_print_first", "debug_topk",
)  # fmt: skip
"""Settings of ``train`` that are about answers, which plain text has none of."""


class PretrainConfig(TrainConfig):
    """Every flag of ``latentwire pretrain``: those of ``train`` but for ``ANSWERING``."""

    needed: ClassVar[tuple[str, ...]] = ("reconstruction_weight", "continuation_weight")

    text: list[str] = MODELS(
        "Plain text: a .txt file, of which each paragraph is a text, or a .jsonl[.gz] file, of which each line has "
        "one; repeat for several.",
        min_length=1,
    )
    text_field: str = MODELS("Field of a line of .jsonl that holds its text.", "text", min_length=1)

    task: str = ""
    answer_weight: float = 0.0
    continuation_weight: float = OBJECTIVES("Weight of going on where half of the source ends.", 1.0, ge=0)
    mode_tokens: int = OBJECTIVES("Learned tokens that tell repeating from going on, of this run alone.", 1, ge=0)
    max_source_tokens: int = DATA("Longest source in sender tokens; longer texts are cut into several.", 512, ge=1)

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_several_files(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("text")
    @classmethod
    def _files_from_anywhere(cls, files: list[str]) -> list[str]:
        return [absolute(file) for file in files]

    @model_validator(mode="after")
    def _answers_nothing(self) -> "PretrainConfig":
        for name in ANSWERING:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is about answers, which plain text has none of")
        return self
