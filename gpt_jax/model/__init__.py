"""The networks and their parts: dropout masks, attention, Transformer, LSTM, loss and decoding."""
