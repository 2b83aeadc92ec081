"""One training run: its arguments, regime, epochs, evaluation, state, checkpoints, folder, TensorBoard events and processes."""
