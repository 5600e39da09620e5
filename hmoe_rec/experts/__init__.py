"""4. A set's fields [B, F, D] -> [B, H]. One file per kind of expert; a new kind is one file and one line here."""

EXPERTS = {
    "flat_dnn": "hmoe_rec.experts.flat_dnn:FlatDNNExpert",
    "dcnv2": "hmoe_rec.experts.dcnv2:DCNv2Expert",
    "gwpfm": "hmoe_rec.experts.gwpfm:GwPFMExpert",
}
