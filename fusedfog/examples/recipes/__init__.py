"""Recipes: short scripts that each answer one question of somebody who has a training script; see README.md."""
