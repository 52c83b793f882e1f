"""Massive Multitask Language Understanding (Hendrycks et al., 2009.03300): exam questions in 57 subjects, four choices each."""
from nanochat.cli import UsageError
from tasks.common import NUMBER, TEXT, TEXTS, Task, load_hub_dataset, render_mc


class MMLU(Task):
    eval_type = "categorical"

    letters = ("A", "B", "C", "D")
    groups = (
        "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_medicine", "college_physics", "computer_security", "conceptual_physics",
        "econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic", "global_facts", "high_school_biology",
        "high_school_chemistry", "high_school_computer_science", "high_school_european_history", "high_school_geography",
        "high_school_government_and_politics", "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics",
        "high_school_physics", "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
        "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning", "management",
        "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition", "philosophy", "prehistory",
        "professional_accounting", "professional_law", "professional_medicine", "professional_psychology", "public_relations",
        "security_studies", "sociology", "us_foreign_policy", "virology", "world_religions",
    )

    def __init__(self, subset: str, split: str, **kwargs):
        super().__init__(**kwargs)
        assert subset == "all", f"the only subset of MMLU here is all, not {subset!r}"
        assert split in ("auxiliary_train", "validation", "dev", "test"), f"there is no MMLU split {split!r}"
        self.ds = load_hub_dataset("cais/mmlu", subset, split, {"question": TEXT, "choices": TEXTS, "answer": NUMBER}).shuffle(seed=42)

    def num_examples(self) -> int:
        return len(self.ds)

    def get_example(self, index: int) -> dict:
        row = self.ds[index]
        if len(row["choices"]) != 4 or row["answer"] not in range(4):
            raise UsageError(f"MMLU example {index} has {len(row['choices'])} choices and the answer {row['answer']!r}; its data are damaged")
        messages = [
            {"role": "user", "content": render_mc(row["question"], list(self.letters), row["choices"])},
            {"role": "assistant", "content": self.letters[row["answer"]]},
        ]
        return {"messages": messages, "subject": row.get("subject"), "letters": list(self.letters)}

    def evaluate(self, problem: dict, completion: str) -> bool:
        assert completion in self.letters, f"{completion!r} is none of {self.letters}"
        return completion == problem["messages"][-1]["content"]
