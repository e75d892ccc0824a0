"""The teacher of a run: its weights, the frozen network, its accuracy, and its cached logits."""
