"""A streamed model as a module of PyTorch, for what takes transformers' models: pipelines,
lm_eval's `hf` class, scripts that look at `.logits` and `.loss`.

It has no parameters, and gives no gradients: weights come and go below it.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from jlayer.api import AutoModel, Model
from jlayer.engine.called import check_called, check_one_prompt, logits_of_rows, vectors_of
from jlayer.engine.ids import Row, as_id_lists, as_rows, plain
from jlayer.errors import UsageError
from jlayer.small_files import as_folder

IGNORED = -100  # a label that no loss is taken of


class StreamedCausalLM(torch.nn.Module):
    """`model`: an open one, which stays its owner's to close, or what `AutoModel.from_pretrained`
    takes, with its `options`."""

    main_input_name = "input_ids"

    def __init__(self, model: Model | str | os.PathLike, **options):
        super().__init__()
        if isinstance(model, Model) and options:
            name = next(iter(options))
            raise UsageError(f"{name}: given with an open model; give it as you open the model")
        is_open = isinstance(model, Model)
        self.model = model if is_open else AutoModel.from_pretrained(model, **options)
        self.name_or_path = self.model.folder
        with as_folder(self.model.folder) as folder:
            self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig(**self.model.generation_config)
        self._published = copy.deepcopy(self.generation_config)
        self.hf_device_map = {"": self.device}  # of accelerate's: nobody moves it elsewhere
        self.eval()

    @classmethod
    def from_pretrained(cls, ref: str | os.PathLike, **options) -> StreamedCausalLM:
        return cls(ref, **options)

    @property
    def device(self) -> torch.device:
        """Where ids are read and logits are given. Where the model runs is in
        `model.engine.device_name`."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations. Logits are float32."""
        return getattr(torch, self.model.dtype)

    def can_generate(self) -> bool:
        return True

    def tie_weights(self) -> None:
        """Nothing: a head that is the embedding table is read from it."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        *,
        inputs_embeds=None,
        **options,
    ) -> CausalLMOutputWithPast:
        """Logits float32 [B, T, V] of ids [B, T] or of embeddings [B, T, D], and with `labels`
        [B, T] the mean loss of those that are not -100, each predicted from the position before it;
        with `num_items_in_batch` their sum divided by that.

        Where `attention_mask` says padding the logits are NaN, and no label may be predicted from
        there. Further arguments of transformers' `forward` that ask for more are refused. Raises
        UsageError, and what a forward pass raises.
        """
        check_called(options)
        check_one_prompt(input_ids, inputs_embeds)
        if inputs_embeds is None:
            rows = _rows(input_ids, attention_mask)
        else:
            rows = vectors_of(self.model.engine, inputs_embeds, attention_mask)
        begin, width = self.model.generation_config.get("bos_token_id"), rows[0].width
        logits = np.full((len(rows), width, self.model.config.vocab_size), np.nan, np.float32)
        found = logits_of_rows(self.model.engine, rows, begin=begin)
        places = _places(rows, attention_mask, width)
        for own, at, row_logits in zip(logits, places, found, strict=True):
            own[at] = row_logits
        logits = torch.from_numpy(logits)
        loss = None
        if labels is not None:
            n_items = options.get("num_items_in_batch")
            loss = _loss(logits, torch.as_tensor(labels).cpu(), n_items=n_items)
        device = getattr(input_ids if inputs_embeds is None else inputs_embeds, "device", None)
        if isinstance(device, torch.device):
            logits, loss = logits.to(device), None if loss is None else loss.to(device)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def generate(self, inputs=None, generation_config=None, *given, **options):
        """As `jlayer.Model.generate`; with return_dict_in_generate transformers' own object."""
        if generation_config is None and self.generation_config != self._published:
            generation_config = self.generation_config  # set since, as in transformers
        found = self.model.generate(inputs, generation_config, *given, **options)
        if not hasattr(found, "keys"):
            return found
        kind = GenerateDecoderOnlyOutput
        if found.beam_indices is not None:
            kind = GenerateBeamDecoderOnlyOutput
        return kind(**{name: found[name] for name in found.keys()})  # noqa: SIM118 - no mapping


def _rows(input_ids, attention_mask):
    given = as_id_lists(input_ids)
    lengths = [len(ids) for ids in given]
    if len(set(lengths)) > 1:
        raise UsageError(f"input_ids: rows of lengths {lengths}, expected equal ones")
    if attention_mask is not None:
        return as_rows(given, attention_mask)
    return [Row(ids, ids) for ids in given]


def _places(rows, attention_mask, n_tokens):
    """Of each row where its tokens stand among its padding: bool [T]."""
    if attention_mask is None:
        return np.ones((len(rows), n_tokens), bool)
    return np.asarray(plain(attention_mask)).reshape(len(rows), n_tokens).astype(bool)


def _loss(logits, labels, *, n_items=None):
    n_rows, n_tokens, n_vocab = logits.shape
    if labels.numel() != n_rows * n_tokens:
        found = f"found {list(labels.shape)}, expected {[n_rows, n_tokens]}"
        raise UsageError(f"labels: {found}, as input_ids are")
    labels = labels.reshape(n_rows, n_tokens)[:, 1:].reshape(-1)
    before = logits[:, :-1].reshape(-1, logits.shape[-1])
    asked = labels != IGNORED
    if before[asked].isnan().any():
        raise UsageError(
            "labels: one is predicted from padding; give -100 for padding, and for the first token "
            "after it"
        )
    if outside := labels[asked][(labels[asked] < 0) | (labels[asked] >= n_vocab)].tolist():
        raise UsageError(
            f"labels: found id {outside[0]}, expected {IGNORED}, or ids below the vocabulary of "
            f"{n_vocab}"
        )
    how = "mean" if n_items is None else "sum"
    loss = torch.nn.functional.cross_entropy(before[asked], labels[asked], reduction=how)
    return loss if n_items is None else loss / n_items
