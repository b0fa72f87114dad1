"""The benchmark as one self-contained HTML page, and its best and worst cases as a figure."""

from eval.report.cases import Case, MethodView, choose_cases, draw_case
from eval.report.grid import render_grid
from eval.report.page import render_benchmark

__all__ = ["Case", "MethodView", "choose_cases", "draw_case", "render_benchmark", "render_grid"]
