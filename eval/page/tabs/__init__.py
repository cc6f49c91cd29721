"""The page's tabs, and what each of them is made of.

Imports eval/page/studio, jobs and limits, eval/report, eval/qwen and eval/request.
"""
