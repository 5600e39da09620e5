"""The commands of `hmoe-rec`, a file per group; hmoe_rec.cli puts them together."""
