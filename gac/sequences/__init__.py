"""Gradients of single sequences, sketched at the modules in the backward pass that a training step runs anyway."""
