"""What is done to models and optimizers, one module per backend and one per concern that backends share."""
