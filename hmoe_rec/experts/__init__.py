"""4. A set's fields [B, F, D] -> [B, H]. One file per kind of expert; a new kind is one file and one line here."""

from hmoe_rec.kinds import Kinds

EXPERTS = Kinds(
    "hmoe_rec.experts.base:Expert",
    {
        "flat_dnn": "hmoe_rec.experts.flat_dnn:FlatDNNExpert",
        "dcnv2": "hmoe_rec.experts.dcnv2:DCNv2Expert",
        "gwpfm": "hmoe_rec.experts.gwpfm:GwPFMExpert",
        "fm": "hmoe_rec.experts.fm:FMExpert",
        "fwfm": "hmoe_rec.experts.fwfm:FwFMExpert",
        "fmfm": "hmoe_rec.experts.fmfm:FmFMExpert",
        "ipnn": "hmoe_rec.experts.ipnn:IPNNExpert",
        "cin": "hmoe_rec.experts.cin:CINExpert",
        "final_mlp": "hmoe_rec.experts.final_mlp:FinalMLPExpert",
        "masknet": "hmoe_rec.experts.masknet:MaskNetExpert",
        "autoint": "hmoe_rec.experts.autoint:AutoIntExpert",
        "sequence": "hmoe_rec.experts.sequence:SequenceExpert",
    },
)
