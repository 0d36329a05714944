"""A model split in two: the client's half, texts to shares and logits to answers, and the function on shares."""
