"""The verbs and what each is for; ``metier.cli.<verb>`` holds the command."""

VERBS = {
    "train": "Train from a run file; resumes by itself.",
    "plan": "Check a run file: resolve, estimate memory, preview the data, run one worst-case step.",
    "data": "Look at data as the model will see them; check every row.",
    "compare": "Compare parts fairly: equal budgets, tuned on both sides, paired seeds, a verdict.",
    "check": "Re-test a paper's claim, or run the contract suite on a part.",
    "list": "List parts, by kind and text.",
    "show": "Show a part, a row of the reading list, or a card.",
    "rows": "The reading list and what works of it.",
    "runs": "List runs and comparisons; show how two runs differ.",
    "report": "Write the self-contained HTML report of a run or comparison.",
    "eval": "Loss and accuracy of a model or run on a data set.",
    "chat": "Talk to the base and the tuned model side by side.",
    "merge": "Merge models or checkpoints.",
    "export": "Write a model folder and prove that it answers as the trained one did.",
    "probe": "Measure a model.",
    "fit": "Fit a scaling law to a table.",
    "schedule": "What theory advises about a schedule: best peaks, bounds, going on for longer.",
    "new": "Scaffold a part and its test.",
    "docs": "Build the documentation site.",
    "doctor": "What this machine offers: versions, devices, disk, models, network.",
}
