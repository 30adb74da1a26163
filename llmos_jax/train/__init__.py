"""Objectives, optimizers, the step and the loop."""
