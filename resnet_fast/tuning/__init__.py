"""Launch choices away from the user: which problems networks pose, what the compiler makes of each, which is fastest.

Nothing here runs when a model runs. Importing it imports no triton, and nothing in it imports typer or rich.
"""
