"""What to train in the time that there is: the command is scripts/plan.py, the page docs/planning.md.

| file | what it is |
|---|---|
| `planner.py` | the candidates, and the best of them that fits |
| `step_time.py` | the time of a step, measured |
| `scaling_law.py` | the loss of a size after so many tokens |
| `finished_runs.py` | the runs that the law is fitted to |
| `page.py` | what is printed |
"""
