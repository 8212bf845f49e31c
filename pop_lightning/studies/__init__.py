"""Experiments about the method; nothing imports them."""
