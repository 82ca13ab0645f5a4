"""From a model and a prompt to tokens: ways of decoding, and what they are held against."""
