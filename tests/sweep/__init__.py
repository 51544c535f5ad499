"""Every family of text models in the installed transformers, with its cache compressed: `python -m tests.sweep`.

`families` says what is tried, `tiny` makes models of it, `subject` calls them, `checks` compares with `DynamicCache`,
`verdict` sums up, `workers` runs a process for each, `table` prints.
"""
