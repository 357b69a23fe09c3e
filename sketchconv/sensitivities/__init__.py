"""Sensitivities without data: what is known of every layer's inputs from the weights alone."""
