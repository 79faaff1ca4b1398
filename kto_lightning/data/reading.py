"""From a source of records to tokenized examples: the settings of both, and the right tokenizer."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kto_lightning.data.dataset import load_records
from kto_lightning.data.tokenize import ExampleSet, Truncation, tokenize_records
from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.loading import vocabulary_size
from kto_lightning.models.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How records become examples; the fields are `KTODataModule`'s keys."""

    tokenizer: str | None
    """A directory or hub id; None: the policy's."""
    chat_template: str | None
    max_length: int | None
    truncation: Truncation
    preprocessing_workers: int | None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"--data.max_length must be at least 2, got {self.max_length}.")
        if self.preprocessing_workers is not None and self.preprocessing_workers < 1:
            raise ConfigError(
                "--data.preprocessing_workers must be at least 1, or null to choose, got "
                f"{self.preprocessing_workers}."
            )

    def load_tokenizer(self, policy: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        """The tokenizer for a policy, whose every id that policy must embed.

        Raises:
            ModelError: if there is no tokenizer, or it knows more tokens than the policy.
        """
        name = self.tokenizer or policy
        known = vocabulary_size(policy, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(
            name, chat_template=self.chat_template, trust_remote_code=trust_remote_code
        )
        if len(tokenizer) > known:
            raise ModelError(
                f"the tokenizer of {name} has {len(tokenizer)} tokens, but the model {policy} "
                f"embeds only {known}. Use the tokenizer that belongs to the model, or resize the "
                "model's embeddings and save it again."
            )
        return tokenizer

    def examples(self, source: str | list[str], tokenizer: PreTrainedTokenizerBase) -> ExampleSet:
        """All records of a source, tokenized. Raises as `load_records` and `tokenize_records`."""
        return tokenize_records(
            load_records(source),
            tokenizer,
            max_length=self.max_length,
            truncation=self.truncation,
            num_workers=self.preprocessing_workers,
        )
