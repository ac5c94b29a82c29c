"""What leaves the package and what comes in.

A compact run leaves as the single-file program that trains it (`bundle`) and as the challenge's submission folder; a
student as a folder that transformers loads by itself (`folder`), and a model as recorded vectors (`vectors`). Exported
and published students come in by `incoming`.
"""
