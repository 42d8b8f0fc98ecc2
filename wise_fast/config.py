"""Settings of an editor: one dataclass, plain JSON types, checked when made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches

from wise_fast.errors import ConfigError

_CHOICES = {
    "layout": ("neuron", "element"),
    "optimizer": ("adam", "sgd"),
    "mode": ("retrieve", "merge"),
    "merging": ("ties", "regmean"),
    "route_by": ("leverage", "score"),
    "reduction": ("mean", "max"),
    "stop": ("auto", "eos", "newline", "none"),
    "units": ("relative", "absolute"),
}


@dataclass(frozen=True)
class WiseConfig:
    """Hyper-parameters of WISE. `WiseConfig()` works on any supported model; `paper()` keeps the paper's values.

    Attributes:
        layer: decoder layer to edit; None takes the one three quarters of the way up.
        layout: "neuron" (a random subset of the d_ff inputs) or "element" (a random subset of the weights).
        mask_ratio: rho, share of the columns or weights that a shard may write.
        optimizer: "adam", or the paper's "sgd".
        lr: learning rate. With relative units and "adam", how far one step moves the projection's output, in `unit`s.
        momentum, weight_decay, clamp: of the masked update; decay and clamp act on the delta alone.
        max_steps: an edit that does not fit within so many steps is reported as failed.
        min_steps: steps before an edit may stop.
        nll: an edit stops once its target's mean token NLL, over prompt and augmented prompts, is at most this, and
            holds if it is at most 1.5 times this when the batch is judged (on the bare prompt over the whole
            vocabulary, on the others over its likely part; less than 0.05 counts as that); 0 never stops early (a fixed
            number of steps, as in the paper).
        first_token: weight of an answer's first token in the mean NLL, beside 1 of each later one: those are read off
            the right tokens before them, so the first carries the edit.
        prefixes, prefix_tokens: augmentation texts that the model generates itself, and their length.
        dropped, drop_rate: augmented prompts that lack a random share of their words (never the subject's).
        prefixes_per_step: how many augmented prompts each step draws beside the bare one, or of the longer ones alone
            in every other step; all of them when there are no more.
        near, near_limit: neighbours (the prompt asked of other subjects) that an edit must leave quiet, and how loud
            they may be in multiples of alpha.
        alpha, beta, gamma: margins of eq. 5 on the routing score.
        margin_weight: of the margins beside the NLL.
        units: "relative" takes margins and lr in units of the median norm of the main memory's own response, which
            calibrates them to the model; "absolute" takes them as they are.
        act_ratio: a memory's threshold is this share of the least score among its edits.
        z_ratio: with route_by "leverage", it is this share of the median, unless the other is less.
        last_ratio: with route_by "leverage", how much newer than that of a memory's median edit the last token of a
            prompt may be, as a ratio, before it has to be louder (`wise_fast.scope`); None sets no limit.
        by_subject: whether only prompts that name the subject of one of a memory's edits are in scope of it, those
            that name a part of it if they are louder, and long ones that name all of it also if they are less loud
            (`wise_fast.subjects`).
        protect: protected update (`wise_fast.protection`), neuron layout only.
        protect_lambda: its lambda, in units of the edit's own mean a P a^T.
        protect_irrelevant: the same of sampled unrelated text, which is protected before the first edit; None leaves it
            out.
        shard_size: edits in a shard, at most, before the next opens; None leaves that to `shard_fill`.
        shard_fill: share of what a shard can learn, as the trace of P, that its edits may take before the next opens
            (protected update only). Long prompts and targets take more than short ones: on the demo model .4 are about
            60 questions, 13 sentences behind a passage, or 9 passages. None leaves that to `shard_size`; if both are
            None, one shard takes everything.
        shards: shards that are merged into one memory (mode "merge").
        mode: "retrieve" keeps a bank of memories, "merge" merges them.
        merging: "regmean", weighted by the covariances of what was taught (protected memories of all columns only), or
            "ties" (the paper's), which keeps far less of what each shard answered. A pack holds no covariances: where
            these weigh, memories that were loaded stay as they are, and what is taught since becomes another.
        rehearsals: passes in which the edits of a shard that is full, or of memories that were merged by covariances
            (each time all that it holds by then), are learned once more, all together (`wise_fast.rehearsal`; protected
            memories only): up to 16 in a step, whatever `batch_size` is, and one augmented prompt of each. Twice or
            three times as many while more than a tenth of what was answered is not, or they would be in vain; the best
            of these rounds counts. Those of a shard that are then answered no more are learned in the next one; where
            they are more than half, or there is no next one (mode "merge") or no names (`by_subject` off), and fewer
            are answered than before, all stay as they were. 0 leaves them be.
        last_dropout: how often, in a step of those, the last token of an augmented prompt gets no response: where the
            model has put the question together wording shows most, and an edit that other tokens carry as well is found
            in other words too (not where the last layer is edited).
        density: share of entries that TIES keeps.
        route_by: what a score is: the norm of the side response ("score", the paper's), or that over the root of the
            prompt's leverage ("leverage"; protected memories that TIES does not merge only). The largest score over
            threshold answers.
        reduction: of a prompt's token scores: "mean" or "max".
        stop: which token ends an answer and is trained after the target: "eos", "newline", "none", or "auto".
        batch_size: edits captured and judged together.
        wave: edits of a batch that are trained at once; the next begins when one of them holds. The whole batch without
            the protected update.
        undo_depth: batches that `rollback` can take back without a checkpoint.
        seed: of masks, prefixes and the order of augmentations.

    Raises:
        ConfigError: a value is out of its range, or settings do not go together; the setting is named.
    """

    layer: int | None = None
    layout: str = "neuron"
    mask_ratio: float = 1.0
    optimizer: str = "adam"
    lr: float = 4.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    clamp: float | None = None
    max_steps: int = 40
    min_steps: int = 3
    nll: float = 0.1
    first_token: float = 5.0
    prefixes: int = 3
    prefix_tokens: int = 6
    prefixes_per_step: int = 2
    dropped: int = 2
    drop_rate: float = 0.25
    near: int = 2
    near_limit: float = 3.0
    alpha: float = 0.5
    beta: float = 2.0
    gamma: float = 1.0
    margin_weight: float = 10.0
    units: str = "relative"
    act_ratio: float = 0.9
    z_ratio: float = 0.25
    last_ratio: float | None = 1.7
    by_subject: bool = True
    protect: bool = True
    protect_lambda: float = 1.0
    protect_irrelevant: float | None = 0.3
    shard_size: int | None = 50
    shard_fill: float | None = 0.4
    shards: int = 2
    mode: str = "retrieve"
    merging: str = "regmean"
    rehearsals: int = 0
    last_dropout: float = 0.5
    density: float = 0.5
    route_by: str = "leverage"
    reduction: str = "mean"
    stop: str = "auto"
    batch_size: int = 8
    wave: int = 2
    undo_depth: int = 16
    seed: int = 0

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        for name in ("mask_ratio", "density", "act_ratio", "z_ratio"):
            self._require(name, lambda v: 0 < v <= 1, "above 0 and at most 1")
        for name in ("lr", "protect_lambda", "near_limit", "first_token"):
            self._require(name, lambda v: v > 0, "above 0")
        for name in ("alpha", "beta", "gamma", "margin_weight", "nll", "weight_decay"):
            self._require(name, lambda v: v >= 0, "at least 0")
        self._require("last_dropout", lambda v: 0 <= v <= 1, "from 0 to 1")
        for name in ("momentum", "drop_rate"):
            self._require(name, lambda v: 0 <= v < 1, "from 0 to below 1")
        for name in ("max_steps", "min_steps", "shards", "batch_size", "wave", "prefix_tokens", "prefixes_per_step"):
            self._require(name, lambda v: isinstance(v, int) and v >= 1, "a whole number from 1")
        for name in ("prefixes", "dropped", "near", "rehearsals", "undo_depth", "seed"):
            self._require(name, lambda v: isinstance(v, int) and v >= 0, "a whole number from 0")
        if self.shard_size is not None:
            self._require("shard_size", lambda v: isinstance(v, int) and v >= 1, "None or a whole number from 1")
        for name in ("clamp", "protect_irrelevant", "last_ratio"):
            if getattr(self, name) is not None:
                self._require(name, lambda v: v > 0, "None or above 0")
        if self.shard_fill is not None:
            self._require("shard_fill", lambda v: 0 < v <= 1, "None, or above 0 and at most 1")
        if self.layer is not None:
            self._require("layer", lambda v: isinstance(v, int), "None or a whole number")
        for name in ("protect", "by_subject"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.mode == "merge" and self.shard_size is None:
            raise ConfigError("mode 'merge' needs shard_size: after how many edits a shard closes")
        whole = self.layout == "neuron" and self.protect and self.mask_ratio == 1
        if (self.mode, self.merging) == ("merge", "regmean") and not whole:
            given = f"layout {self.layout!r}, protect {self.protect}, mask_ratio {self.mask_ratio}"
            needed = "merging 'regmean' needs layout 'neuron', protect and mask_ratio 1"
            raise ConfigError(f"{needed}; given: {given}; or set merging 'ties'")

    def _require(self, name: str, holds, expected: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not holds(value):
            raise ConfigError(f"{name} is {value!r}, expected {expected}")

    @property
    def moments(self) -> int:
        """How many moments of each value the optimizer keeps."""
        return 2 if self.optimizer == "adam" else int(self.momentum > 0)

    @classmethod
    def paper(cls, **changes) -> WiseConfig:
        """The paper's hyper-parameters (WISE, section 4.1 and appendix A), for comparison; `changes` are set on top."""
        values = dict(
            layout="element",
            mask_ratio=0.2,
            optimizer="sgd",
            lr=1.0,
            max_steps=70,
            nll=0.0,
            first_token=1.0,
            prefixes=10,
            prefix_tokens=10,
            prefixes_per_step=10,
            dropped=0,
            near=0,
            alpha=5.0,
            beta=20.0,
            gamma=10.0,
            margin_weight=1.0,
            units="absolute",
            act_ratio=1.0,
            shard_size=None,
            shard_fill=None,
            rehearsals=0,
            last_dropout=0.0,
            protect=False,
            by_subject=False,
            merging="ties",
            route_by="score",
            stop="none",
            batch_size=1,
        )
        return cls(**(values | changes))

    def replace(self, **changes) -> WiseConfig:
        """A copy with these `changes`, checked anew."""
        return replace(self, **changes)

    def to_dict(self) -> dict:
        """All settings by name, JSON values only; `from_dict` restores an equal config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> WiseConfig:
        """Settings from `values`, defaults elsewhere; an unknown name is a ConfigError that suggests the nearest."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown setting {name!r}{hint}")
        return cls(**values)
