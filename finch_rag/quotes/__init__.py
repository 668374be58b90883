"""Which sentences of the passages an answer rests on."""
