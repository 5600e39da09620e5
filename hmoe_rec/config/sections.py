"""The sections of a run file, key by key: type, default and meaning. `hmoe-rec keys` prints this page.

What a single key cannot show (names across sections, options of experts) is checked in `hmoe_rec.config`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from hmoe_rec.data.schema import Schema
from hmoe_rec.data.strict import Part
from hmoe_rec.sharding.constraints import Constraint, Constraints
from hmoe_rec.towers.layout import Combine, GateCombine

METRICS = ("auc", "gauc", "logloss", "ne")
ShardingType = Literal[
    "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"
]
PLANS = ("auto", "torchrec", *get_args(ShardingType))


def _trained(given: Any) -> Any:
    if given in ("int8", "int4"):
        raise ValueError(f"{given} is for serving, it is not trained; train in fp32 or fp16, quantize what is exported")
    return given


def _several(given: Any) -> Any:
    return (given,) if isinstance(given, str | Mapping) else given


def _kinds(given: Any) -> Any:
    given = _several(given)
    if not isinstance(given, list | tuple):
        return given
    return tuple({"kind": kind} if isinstance(kind, str) else kind for kind in given)


Uris = Annotated[tuple[str, ...], BeforeValidator(lambda given: () if given is None else _several(given))]
Kinds = Annotated[tuple[dict[str, Any], ...], BeforeValidator(_kinds)]
Kind = Annotated[dict[str, Any], BeforeValidator(lambda given: {"kind": given} if isinstance(given, str) else given)]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Hidden = tuple[PositiveInt, ...]
Precision = Annotated[Literal["fp32", "fp16"], BeforeValidator(_trained)]
Communication = Literal["fp32", "fp16", "bf16"]


def _named_by_text(given: Any) -> Any:
    # A key is the same whether it comes from YAML (0) or from JSON ("0").
    return {str(key): value for key, value in given.items()} if isinstance(given, Mapping) else given


def _rates(given: Any) -> float | dict[str, float]:
    """One message for what is a number or a mapping of them."""
    values = given.values() if isinstance(given, Mapping) else [given]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1 for x in values):
        raise PydanticCustomError("rates", "expected a share in (0, 1], or {task: share, ...}")
    return {str(task): float(x) for task, x in given.items()} if isinstance(given, Mapping) else float(given)


def _propensity(given: Any) -> str | dict[str, Any]:
    kinds = {
        "power": lambda x: isinstance(x, int | float) and x >= 0,
        "once": lambda x: isinstance(x, int | float) and 0 < x <= 1,
        "table": lambda x: isinstance(x, list | tuple) and x and all(isinstance(v, int | float) and v > 0 for v in x),
    }
    right = given == "estimated"
    if isinstance(given, Mapping) and len(given) == 1:
        kind, value = next(iter(given.items()))
        right = kind in kinds and bool(kinds[kind](value))
    if not right:
        expected = "estimated, {power: a number >= 0}, {once: a number in (0, 1]} or {table: [numbers > 0]}"
        raise PydanticCustomError("propensity", "expected {expected}", {"expected": expected})
    return dict(given) if isinstance(given, Mapping) else given


Rates = Annotated[float | dict[str, float], PlainValidator(_rates)]


class SlicesConfig(Part):
    """Rates of their own for some values of a column."""

    column: str | None = Field(default=None, description="a column of the files (null = one slice)")
    rates: Annotated[dict[str, Rates], BeforeValidator(_named_by_text)] = Field(
        default={}, description="value -> rate, or task -> rate; others have sampling.negatives"
    )


class ProbabilityConfig(Part):
    """Rows by a probability of their own."""

    column: str | None = Field(default=None, description="each row is kept with min(1, scale x value) (null = off)")
    scale: PositiveFloat = Field(default=1.0, description="see column")


class SamplingConfig(Part):
    """Which rows of data.train are learned from. Validation, test and prediction read all rows."""

    negatives: Rates = Field(default=1.0, description="share of the negatives that is kept, or task -> share (1 = all)")
    slices: SlicesConfig = Field(default=SlicesConfig(), description="rates by the value of a column")
    probability: ProbabilityConfig = Field(default=ProbabilityConfig(), description="rows by a column")
    correction: Literal["weights", "logit"] = Field(
        default="weights",
        description="what keeps predictions calibrated: rows weigh 1 / rate, or an offset of the logit in the loss",
    )
    key: Uris = Field(
        default=(), description="columns that name a row; equal ones are kept alike ([] = its file and number)"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="another seed keeps other rows")

    @property
    def active(self) -> bool:
        rates = [self.negatives, *self.slices.rates.values()]
        lowest = min(min(rate.values(), default=1.0) if isinstance(rate, dict) else rate for rate in rates)
        return lowest < 1 or self.probability.column is not None

    def rates(self, tasks: Sequence[str], value: str | None = None) -> dict[str, float]:
        """Task -> rate of its negatives, in a slice or elsewhere; tasks without a rate are left out."""
        given = self.negatives if value is None else self.slices.rates[value]
        return given if isinstance(given, dict) else dict.fromkeys(tasks, given)


# `schema` is the right word for the key, and BaseModel has a deprecated method of that name.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "schema"')

    class DataConfig(Part):
        """Where the examples are and what their columns mean."""

        train: Uris = Field(
            default=(), description="Parquet to learn from: a file, directory, glob or URI, or a list of them"
        )
        validation: Uris = Field(default=(), description="for early stopping and the choice of the best checkpoint")
        test: Uris = Field(default=(), description="for the report at the end")
        schema: Schema | None = Field(
            default=None, description="a schema file, or the schema itself; or features and tasks"
        )
        tasks: tuple[str, ...] | None = Field(
            default=None, description="tasks of the schema to learn, in this order (null = all)"
        )
        synthetic: dict[str, Any] | None = Field(
            default=None,
            description="{dir: ..., rows: ..., seed: ...}: make the synthetic log there, if it is not there yet",
        )
        leave_out: Uris = Field(
            default=(), description="fields of the schema that the model shall not see; patterns such as '*_bucket'"
        )
        statistics: dict[str, Any] | str | None = Field(
            default=None,
            description="what `hmoe-rec data fit` wrote: a file, or its content (null = fitted at the start of a run)",
        )
        sampling: SamplingConfig = Field(default=SamplingConfig(), description="rows of train that are learned from")
        num_workers: PositiveInt = Field(default=1, description="threads that decode Parquet ahead, per process")
        lanes: PositiveInt | None = Field(
            default=None,
            description="pieces the epoch is cut into; fix the order (null = one per 8,192 rows of a batch, 8 to 128)",
        )
        shuffle_rows: PositiveInt = Field(default=65536, description="rows of the shuffle buffer, over all processes")


class SetConfig(Part):
    """An embedding set: a table per field, all of one width."""

    dim: PositiveInt | None = Field(default=None, description="width (null = model.embedding_dim)")
    fields: tuple[str, ...] | None = Field(default=None, description="fields it embeds (null = all)")
    owner: str | None = Field(default=None, description="the task it belongs to, for display")


class GateInputConfig(Part):
    """What a task's gate looks at."""

    sets: Uris = Field(description="the sets whose fields it sees")
    combine: GateCombine = Field(default="concat", description="side by side, or added up (sets of one width)")


class GateConfig(Part):
    """The gates, one per task."""

    hidden: Hidden = Field(default=(), description="widths of the hidden layers before the softmax")


class TowerConfig(Part):
    """The towers, one per task. Further keys are options of the kind."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(default="mlp", description="mlp; sngp or bootstrap, which also tell how sure they are")
    hidden: Hidden = Field(default=(64,), description="widths of the hidden layers before the logit")

    @property
    def options(self) -> dict[str, Any]:
        """All but the kind, as the constructor of its class takes them."""
        return {"hidden": self.hidden, **(self.model_extra or {})}


Tower = Annotated[TowerConfig, BeforeValidator(lambda given: {"kind": given} if isinstance(given, str) else given)]


class FrozenConfig(Part):
    """Pre-trained vectors keyed by the ids of a field: a Parquet file with a row per id."""

    field: str = Field(description="the id field whose ids are its rows; not hashed")
    path: str = Field(description="the Parquet file, a path or URI")
    id_column: str | None = Field(default=None, description="its column of ids (null = the field's name)")
    vector_column: str | None = Field(default=None, description="its column of vectors (null = the one that there is)")
    dim: PositiveInt | None = Field(default=None, description="width of the vectors (null = as the file has it)")


class EncodingConfig(Part):
    """How numbers, behavior sequences and pre-trained vectors become vectors of an embedding set."""

    numbers: Kind = Field(
        default={"kind": "scalar"},
        description="of every number: scalar, mnse, quantile, log_square, autodis, periodic, piecewise_linear",
    )
    sequences: Kind = Field(
        default={"kind": "mean"}, description="of every behavior sequence: mean, target_attention, tim, din, sasrec"
    )
    fields: dict[str, Kind] = Field(
        default={}, description="number, sequence or similarity -> its own {kind: ..., option: ...}"
    )
    similarities: dict[str, dict[str, Any]] = Field(
        default={}, description="name -> {kind: cosine, dot, history, tiers or vector, ...}: SimEnc"
    )
    frozen_vectors: dict[str, FrozenConfig] = Field(
        default={}, description="name -> {field, path, id_column, vector_column, dim}: for similarities"
    )
    sequence_fields: bool = Field(
        default=True, description="pooled behaviors are fields; false: only experts of kind sequence see them"
    )
    vector_fields: bool = Field(
        default=True, description="pre-trained vectors are fields by a linear layer; false: only similarities see them"
    )


class ModelConfig(Part):
    """Sets x experts x tasks: by a preset, spelled out, or a preset amended by what is spelled out beside it."""

    preset: str | None = Field(
        default=None,
        description="single, shared_bottom, mmoe, ple, multi_embedding, stem, ame or stem_al (null = spelled out)",
    )
    from_preset: str | None = Field(
        default=None, description="for information: the preset that a resolved file came from"
    )
    embedding_dim: PositiveInt | None = Field(default=None, description="width of the sets (null = 16)")
    num_sets: PositiveInt | None = Field(default=None, description="multi_embedding: number of sets (null = 2)")
    num_experts: PositiveInt | None = Field(
        default=None, description="mmoe (null = 4), multi_embedding and ame (null = one a set): number of experts"
    )
    task_experts: PositiveInt | None = Field(
        default=None, description="ple, stem, stem_al: experts of each task (null = one of each kind)"
    )
    shared_experts: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="ple (null = 2), stem and stem_al (null = one of each kind): shared experts"
    )
    widths: tuple[PositiveInt, ...] | None = Field(
        default=None, description="ame: width of every set (null = 1, 2 and 4 times embedding_dim)"
    )
    gate_sets: dict[str, str] | None = Field(
        default=None,
        description="ame: task -> set that feeds its gate (null = first task set1 ... last task the last set)",
    )
    main_task: str | None = Field(default=None, description="stem_al: the task that is served (null = the first)")
    aux_sets: Literal["shared", "per_aux"] | None = Field(
        default=None, description="stem_al: auxiliary tasks share one set (null), or have one each"
    )
    expert: Kinds | None = Field(
        default=None,
        description="of the preset's experts: {kind: ..., option: ...}, or several, dealt in turn (null = flat_dnn)",
    )
    expert_dim: PositiveInt = Field(default=128, description="output width of every expert")
    sets: dict[str, SetConfig] = Field(default={}, description="name -> {dim, fields, owner}")
    experts: dict[str, dict[str, Any]] = Field(default={}, description="name -> {kind, set, options of the kind}")
    routes: dict[str, dict[str, Any]] = Field(
        default={}, description="task -> {expert: none, read or train}; missing = none"
    )
    gate_inputs: dict[str, GateInputConfig] = Field(
        default={}, description="task -> {sets, combine}; missing = the first set that the task trains"
    )
    combine: Combine = Field(default="gate", description="how a task mixes its experts")
    gate: GateConfig = Field(default=GateConfig(), description="hidden layers of the gates")
    tower: Tower = Field(default=TowerConfig(), description="kind and hidden layers of the towers")
    dropout: Share = Field(default=0.0, description="in the towers; an expert has an option of its own")
    encoding: EncodingConfig = Field(default=EncodingConfig(), description="numbers, sequences, pre-trained vectors")
    embedding_init_std: NotNegative = Field(default=0.01, description="standard deviation of the tables at the start")
    table_precision: Precision = Field(default="fp32", description="of the tables: fp32 or fp16")
    table_precisions: dict[str, Precision] = Field(
        default={}, description="table, set, field or pattern -> precision of its tables; the later one counts"
    )


class StopConfig(Part):
    """When to stop before the last epoch."""

    metric: Literal["auc", "gauc", "logloss", "ne"] = Field(default="auc", description="on the validation data")
    task: str | None = Field(default=None, description="of this task (null = mean over the tasks)")
    patience: PositiveInt = Field(default=2, description="evaluations without a better value")


class BestConfig(Part):
    """Which checkpoint is the best one."""

    metric: Literal["auc", "gauc", "logloss", "ne"] = Field(default="auc", description="on the validation data")
    task: str | None = Field(default=None, description="of this task (null = mean over the tasks)")


class ExposureConfig(Part):
    """Positives weigh less the more often the user was shown the item before: inverse propensities."""

    column: str | None = Field(
        default=None, description="earlier exposures of each row, from `hmoe-rec data exposures` (null = off)"
    )
    tasks: Uris = Field(default=(), description="whose positives are weighted ([] = all)")
    propensity: Annotated[str | dict[str, Any], PlainValidator(_propensity)] = Field(
        default="estimated",
        description="of a positive at exposure k: estimated, {power: g} = k^g, {once: p} = (1 - (1 - p)^k) / p, or "
        "{table: a list, first exposure first}",
    )
    strata: Uris = Field(
        default=(), description="estimated: columns in whose values exposures are compared, such as the item"
    )
    monotone: Literal["rising", "falling"] = Field(
        default="rising", description="estimated: never falling (weights <= 1), or never rising (set clip: [1, 10] too)"
    )
    smoothing: PositiveFloat = Field(default=10.0, description="estimated: expected positives that are added to each k")
    max_exposures: PositiveInt = Field(default=20, description="exposures that are told apart; more count as so many")
    clip: tuple[PositiveFloat, PositiveFloat] = Field(default=(0.1, 1.0), description="least and largest weight")
    normalize: bool = Field(default=True, description="divide by the mean weight, so that the mean prediction stays")
    fitted: dict[str, dict[str, float | tuple[float, ...]]] | None = Field(
        default=None, description="what the run found at its start, by task (null = not yet)"
    )


class PublishConfig(Part):
    """Weights for whoever serves: now and then all, in between the rows that have changed."""

    to: str = Field(description="directory or URI")
    every: PositiveInt = Field(default=1000, description="steps between publications, besides the run's end")
    base_every: Annotated[int, Field(ge=0)] = Field(default=100, description="deltas between two full ones")
    keep: PositiveInt = Field(default=2, description="full ones that stay, with their deltas")


class MonitorConfig(Part):
    """What is watched in training besides losses and metrics."""

    collapse_every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps between singular spectra of all tables (0 = off; 1000 is a good choice)"
    )
    rows: PositiveInt = Field(default=4096, description="of a table that are looked at, each time others")
    collapse_below: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="warn of tables whose information abundance, less 1, is below this share of a random table's",
    )


class TrainConfig(Part):
    """The run: how long, how fast, what is written when. Steps and batch sizes are over all processes."""

    run_dir: str = Field(
        default="runs/run", description="where config, metrics, checkpoints and report go; a path or URI"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="of tables, dense parameters and shuffling")
    max_steps: PositiveInt | None = Field(default=None, description="stop after so many steps (null = epochs decide)")
    epochs: PositiveInt = Field(default=1, description="passes over the training data")
    global_batch_size: PositiveInt = Field(default=4096, description="examples a step over all processes")
    shuffle: bool = Field(default=True, description="seeded, the same for any number of processes")
    learning_rate: PositiveFloat = Field(default=0.001, description="of the dense part (Adam)")
    embedding_learning_rate: PositiveFloat = Field(default=0.05, description="of the tables")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="steps from 0 to both learning rates")
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of both rates after the warm-up"
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="where the decay ends, as a share"
    )
    weight_decay: NotNegative = Field(default=0.0, description="decoupled, of the dense part")
    clip_norm: PositiveFloat | None = Field(default=10.0, description="largest norm of the dense gradient (null = off)")
    embedding_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = Field(
        default="rowwise_adagrad", description="of the tables"
    )
    embedding_eps: PositiveFloat = Field(default=1e-8, description="epsilon of the tables' optimizer")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: matrix products of the dense part")
    pipeline: Literal["auto", "plain", "base", "sparse_dist"] = Field(
        default="auto", description="plain: the loop to debug with; the others overlap input, communication and compute"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    log_every: PositiveInt = Field(default=50, description="steps between lines in metrics.jsonl")
    evaluate_every: PositiveInt | None = Field(
        default=None, description="steps, besides every epoch's end (null = only there)"
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None, description="steps, besides every epoch's end (null = only there)"
    )
    keep_checkpoints: PositiveInt = Field(default=3, description="the latest ones; the best one is kept too")
    early_stop: StopConfig | None = Field(default=None, description="{metric, task, patience} (null = never)")
    best: BestConfig = Field(
        default=BestConfig(), description="{metric, task}: which checkpoint test, evaluate and predict use"
    )
    task_weights: dict[str, NotNegative] = Field(default={}, description="task -> weight of its loss; missing = 1")
    losses: dict[str, Kinds] = Field(
        default={},
        description="task -> what it minimizes, such as [{kind: bce}, {kind: pair, weight: 0.3}]; missing = bce",
    )
    task_weighting: Kind = Field(
        default={"kind": "fixed"},
        description="beside task_weights: fixed, uncertainty (learned), dwa (more for tasks that learn slowly)",
    )
    gradient_surgery: Literal["none", "pcgrad"] = Field(
        default="none", description="pcgrad: projects conflicting gradients of tasks at the experts' outputs"
    )
    log_negative_gradients: bool = Field(
        default=False, description="logs the mean absolute gradient by the logits of negatives, per task"
    )
    decorrelation: NotNegative = Field(
        default=0.0, description="weight of the penalty on correlated outputs of different experts (0 = off)"
    )
    exposure: ExposureConfig = Field(default=ExposureConfig(), description="weights of positives by earlier exposures")
    resume: bool = Field(default=False, description="go on from the latest checkpoint in run_dir, if there is one")
    num_threads: PositiveInt | None = Field(
        default=None, description="CPU threads of this process (null = chosen for you)"
    )
    monitor: MonitorConfig = Field(default=MonitorConfig(), description="of tables that collapse")
    publish: PublishConfig | None = Field(
        default=None, description="{to, every, base_every, keep}: weights for serving, in small steps (null = not)"
    )


class TableRuleConfig(Part):
    """Demands on the tables of a pattern; what is not given is the planner's choice."""

    types: tuple[ShardingType, ...] = Field(
        default=(), description="sharding types to choose from; data_parallel: whole on every process"
    )
    kernels: tuple[Literal["fused", "fused_uvm", "fused_uvm_caching"], ...] = Field(
        default=(), description="fused: tables in the device's memory (default); uvm: in the machine's; or cached"
    )
    min_partition: PositiveInt | None = Field(default=None, description="narrowest block of columns (null = 16)")
    cache_load_factor: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the rows that fused_uvm_caching keeps on the device (null = 0.2)"
    )
    pooling_factor: PositiveFloat | None = Field(
        default=None, description="mean ids of an example in a feature (null = sharding.pooling, else 1)"
    )
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="processes that may hold a part")
    hosts: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="machines that may hold a part")


class ShardingConfig(Part):
    """How the tables are laid over the processes."""

    plan: str = Field(
        default="auto",
        description="auto, table_wise, row_wise, column_wise, table_row_wise, table_column_wise, grid_shard, "
        "data_parallel, torchrec (its planner), or the path of a plan (.json)",
    )
    topology: str | dict[str, Any] | None = Field(
        default=None,
        description="for the estimates: h100x8, h200x8, a100x8, a100x8_40gb, b200x8, cpu, the path of a topology file, "
        "or {base: h100x8, ...} (null = this machine)",
    )
    constraints: dict[str, TableRuleConfig] = Field(
        default={}, description="table, set, field or pattern -> {types, kernels, ranks, ...}; the later one counts"
    )
    together: tuple[tuple[str, ...], ...] = Field(
        default=(), description="groups of sets, fields or tables that go to one machine"
    )
    apart: tuple[tuple[str, ...], ...] = Field(
        default=(), description="groups of sets, fields or tables that share no machine"
    )
    pooling: dict[str, PositiveFloat] = Field(
        default={},
        description="field or table -> mean ids of an example, or the file that `hmoe-rec data pooling` wrote; "
        "missing = 1",
    )
    measure_pooling: bool = Field(
        default=False, description="measure what pooling does not say on a sample of data.train, before planning"
    )
    communication: Communication = Field(
        default="fp32", description="precision of the tables' vectors between processes: fp32, fp16 or bf16"
    )
    gradient_communication: Communication | None = Field(
        default=None, description="of their gradients (null = as communication)"
    )
    replicas: PositiveInt = Field(
        default=1, description="groups of processes that each hold all tables (2D parallel); a plan is one of a group"
    )
    sync_every: PositiveInt = Field(
        default=100, description="steps between two averagings of the tables over the replica groups"
    )
    reserved: Share = Field(default=0.15, description="share of the memory that is left to the dense part")
    seconds: PositiveFloat = Field(default=120.0, description="auto looks no longer for a better plan")

    def rules(self) -> Constraints:
        """The demands on the plan as the planner takes them."""
        tables = {pattern: Constraint(**dict(rule)) for pattern, rule in self.constraints.items()}
        return Constraints(tables, self.together, self.apart, self.pooling)
