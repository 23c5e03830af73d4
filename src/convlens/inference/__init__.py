"""Shipping: the bundle of a trained net, and the Classifier that uses it."""
