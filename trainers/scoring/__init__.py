"""From an explanation to its reward: frozen models, the formula put onto them, every other reward."""
