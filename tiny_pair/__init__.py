"""A teacher and a student small enough for two CPU cores, and the task on which they show a distillation.

Real Qwen3 architecture, tokenizer manners and chat template; toy size. Knows neither the server nor the trainer.
"""
