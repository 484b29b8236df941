"""The inits that need data: covariances, gradients and principal components of a running model."""
