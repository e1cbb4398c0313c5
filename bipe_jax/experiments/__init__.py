"""Experiments: sweeps whose question, prediction and outcome are on one page.

An experiment (`experiment.Experiment`) names its points; `runner` trains them through `launch.sweep`; what
their evaluations wrote becomes a table over seeds (`outcomes`), and files (`files`).
"""
