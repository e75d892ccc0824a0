"""The teacher of a run: where its weights are, the frozen network, how good it is, and its logits, kept."""
