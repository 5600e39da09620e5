"""2. Raw values -> one vector per field and embedding set.

One room entered twice: numbers and pre-trained vectors are encoded before the lookup, behavior sequences are pooled
after it. `fields.FieldEncoder` puts a set's fields side by side for the experts. A new kind is one file and one line
here.
"""

from hmoe_rec.kinds import Kinds
from hmoe_rec.types import Encoding, NumberField, Part, SequenceField

POOLINGS = Kinds(
    "hmoe_rec.encoding.pooling:Pooling",
    {
        "mean": "hmoe_rec.encoding.pooling:MeanPooling",
        "target_attention": "hmoe_rec.encoding.pooling:TargetAttention",
        "tim": "hmoe_rec.encoding.temporal_interest:TIM",
        "din": "hmoe_rec.encoding.din:DIN",
        "sasrec": "hmoe_rec.encoding.sasrec:SASRec",
    },
)
NUMBERS = Kinds(
    "hmoe_rec.encoding.numbers:NumberEncoder",
    {
        "scalar": "hmoe_rec.encoding.scalar:ScalarNumbers",
        "mnse": "hmoe_rec.encoding.numeral:MNSE",
        "quantile": "hmoe_rec.encoding.bins:QuantileBins",
        "log_square": "hmoe_rec.encoding.bins:LogSquareBins",
        "autodis": "hmoe_rec.encoding.autodis:AutoDis",
        "periodic": "hmoe_rec.encoding.periodic:Periodic",
        "piecewise_linear": "hmoe_rec.encoding.periodic:PiecewiseLinear",
    },
)
SIMILARITIES = Kinds(
    "hmoe_rec.encoding.similarity:Similarity",
    {
        "cosine": "hmoe_rec.encoding.similarity:Cosine",
        "dot": "hmoe_rec.encoding.similarity:Dot",
        "history": "hmoe_rec.encoding.similarity:History",
        "tiers": "hmoe_rec.encoding.similarity:Tiers",
        "vector": "hmoe_rec.encoding.similarity:Vector",
    },
)
SIMILARITY_NUMBERS = {"kind": "mnse"}  # of a similarity, unless its field says otherwise: SimEnc


def part_of_number(number: NumberField, encoding: Encoding) -> Part:
    """Kind and options of a number's encoder. A similarity goes to MNSE where nothing is said of it."""
    default = SIMILARITY_NUMBERS if number.name in encoding.similarities else encoding.numbers
    return encoding.fields.get(number.name, default)


def part_of_sequence(sequence: SequenceField, encoding: Encoding) -> Part:
    """Kind and options of a sequence's pooling."""
    return encoding.fields.get(sequence.name, encoding.sequences)
