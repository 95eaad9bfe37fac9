"""How much memory a teacher's node and a student's need: estimates from a model's sizes and the settings.

Formulas are in docs/models.md. Imports neither torch nor transformers.
"""
