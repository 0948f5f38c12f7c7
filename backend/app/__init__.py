"""The deployed half of NutriLearn: this folder and `ml-models` are a whole server."""
