"""HumanEval (Chen et al., 2107.03374): Python functions to be written from their docstring, judged by running their tests."""
import re

from nanochat.execution import check_sandbox, execute_code
from tasks.common import TEXT, Task, load_hub_dataset

FENCED_RE = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def extract_imports(prompt: str) -> str:
    """The import lines that a prompt begins with; blank lines and comments between them are left out."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def extract_program(completion: str) -> str:
    """The first fenced block of code, or all of the text if there is none."""
    match = FENCED_RE.search(completion)
    return (match[1] if match else completion).strip()


class HumanEval(Task):
    eval_type = "generative"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        check_sandbox()
        columns = dict.fromkeys(("prompt", "canonical_solution", "entry_point", "test"), TEXT)
        self.ds = load_hub_dataset("openai/openai_humaneval", "openai_humaneval", "test", columns).shuffle(seed=42)

    def num_examples(self) -> int:
        return len(self.ds)

    def get_example(self, index: int) -> dict:
        row = self.ds[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, problem: dict, completion: str) -> bool:
        """Runs the program and its test in the sandbox, each in a process of its own: a program that exits has not passed.

        The prompt's imports are given to both, everything else the program must bring along."""
        imports = extract_imports(problem["messages"][0]["content"])
        program = f"{imports}\n\n{extract_program(completion)}"
        return execute_code(program, test=f"{imports}\n\n{problem['test']}\ncheck({problem['entry_point']})").success
