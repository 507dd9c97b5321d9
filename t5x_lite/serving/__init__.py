"""A page and a JSON API to try one model, with adapters to switch on and off."""
