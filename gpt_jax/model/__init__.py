"""The network and its exact pieces: masks, attention, transformer, loss, decoding."""
