"""What must see data before an adapter can start: covariances, gradients, principal components."""
