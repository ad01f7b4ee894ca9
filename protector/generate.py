"""New question-answer triples from a strong LLM, scenario by scenario: the paper's second source of training data.

    for scenario, i:   (question, accepted, rejected) = LLM(prompt(scenario, style_i))     harmful scenarios  -> triple
                       (question, answer), label 0    = LLM(prompt(near misses, style_i))  looks harmful, isn't -> pair
    keep it if it has the form, says what it should and isn't in the pool yet

    python -m protector generate --url http://127.0.0.1:8000/v1 --model NAME --out runs/new.jsonl --pool own

OUT holds the rows, OUT.log.jsonl one line per request without any text, OUT.report.json what was kept, dropped and why. A
run that was interrupted goes on when it is started again with the same settings; others write beside what is there.

Source: MLLM-Protector, data generation; scenarios after MM-SafetyBench's thirteen.
"""
import json
import random
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from . import data
from .base import whole_file
from .errors import DataError
from .evaluate.endpoint import GIVE_UP, Endpoint, EndpointError, PromptError
from .evaluate.judge import is_refusal
from .options import option

PROMPT_VERSION = 1  # part of each row's provenance; change it with any change of the prompts below
NEAR_MISS = "near-miss"
SCENARIOS = {
    "01-illegal-activity": "breaking the law: theft, drugs, trespass, smuggling",
    "02-hate-speech": "insulting or degrading people for what group they belong to",
    "03-malware": "software that spies, steals, locks or destroys",
    "04-physical-harm": "hurting a person or an animal, or unsafe acts at home and at work",
    "05-economic-harm": "gambling, pyramid schemes, exploitation, wrecking someone's finances",
    "06-fraud": "cheating people: scams, forged papers, fake reviews, phishing",
    "07-sex": "unwanted or exploitative sexual content, in words fit for a data set",
    "08-political-lobbying": "manipulating voters, fake campaigns, hidden lobbying",
    "09-privacy-violence": "finding, following or exposing a person against their will",
    "10-legal-opinion": "reckless legal advice that would get the asker into trouble",
    "11-financial-advice": "reckless financial advice that would ruin the asker",
    "12-health-consultation": "dangerous medical advice",
    "13-government-decision": "unfair or secret decisions about people by an authority",
    NEAR_MISS: "harmless requests that sound alarming: killing a process, shooting a portrait, a bomb in chess, poisonous plants in the garden"}
STYLES = ("a short casual question", "a polite request with some background", "an order of one line", "a question about an image that the assistant is shown",
          "a question of a worried person", "a request for a story, a poem or a list", "a question of a professional", "a question with a spelling mistake or two")
_TRIPLE = ("You help to train a safety filter. Write one example about: {topic}.\nReply with one JSON object with three strings:\n"
           "\"question\": what a user asks, as {style};\n"
           "\"accepted\": how a good assistant answers: it declines the harmful part in a few words and helps with what is legitimate, two to four sentences;\n"
           "\"rejected\": how a careless assistant goes along with it, two to four sentences in general terms, without any detail that would work in practice.")
_PAIR = ("You help to train a safety filter that must not cry wolf. Write one example about: {topic}.\nReply with one JSON object with two strings:\n"
         "\"question\": what a user asks, as {style};\n\"answer\": a correct, harmless and helpful answer of two to four sentences.")
_LIMITS = {"question": (8, 600), "accepted": (20, 2000), "rejected": (20, 2000), "answer": (20, 2000)}  # characters
_CONTEXT, _PROMPT = 2048, 512  # tokens of a GGUF model's context, and of the longest prompt in it at most
_SAME = 0.6  # share of common word triples from which two questions count as one


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `protector generate`."""

    out: str = option("runs/generated.jsonl", "file to write or to go on with")
    url: str = option("", "OpenAI-compatible server of the strong LLM; its key is read from OPENAI_API_KEY")
    model: str = option("", "the LLM's name there")
    gguf: str = option("", "GGUF file, or default for the base model, instead of a server")
    scenarios: tuple[str, ...] = option(tuple(SCENARIOS), "of which to write")
    each: int = option(100, "requests per scenario")
    pool: tuple[str, ...] = option(("own",), "files whose questions must not come again")
    seed: int = option(0, "of styles and sampling")
    temperature: float = option(1.0, "of sampling")
    tokens: int = option(700, f"of one reply; with gguf at most {_CONTEXT - _PROMPT}")
    json_mode: bool = option(True, "ask the server for a JSON object; off for servers without response_format")
    workers: int = option(4, "requests at once to a server")
    timeout_s: float = option(120.0, "of one attempt")


class Pool:
    """Questions that are known, and whether a new one is one of them in other words.

    Two questions are the same if their word triples overlap by 0.6 or more (Jaccard), or their words are equal.

    Example:
        pool = Pool(["How do I clean the old kettle in my kitchen?"]); pool.has("how do i clean the old kettle in my kitchen")  # True
    """

    def __init__(self, questions=()):
        self._triples, self._where = [], {}
        for question in questions:
            self.add(question)

    def add(self, question):
        triples = _word_triples(question)
        for triple in triples:
            self._where.setdefault(triple, []).append(len(self._triples))
        self._triples.append(triples)

    def has(self, question):
        triples = _word_triples(question)
        shared = Counter(i for triple in triples for i in self._where.get(triple, ()))
        return any(n >= _SAME * len(triples | self._triples[i]) for i, n in shared.items())


def _word_triples(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + 3]) for i in range(max(len(words) - 2, 1))} if words else set()


class LocalChat:
    """A GGUF model in this process, asked as an Endpoint is.

    Args:
        path: GGUF file.
        n_threads: CPU threads; llama-cpp-python's default if None.
    """

    def __init__(self, path, n_threads=None):
        from .engine import llama_cpp

        self.llama = llama_cpp.Llama(str(path), n_ctx=_CONTEXT, n_threads=n_threads, verbose=False)
        self.model, self._lock = Path(path).stem, threading.Lock()

    def chat(self, messages, max_tokens=512, temperature=0.0, accept=None, seed=None, response_format=None):
        """As Endpoint.chat, with one attempt: the same seed would give the same junk again."""
        with self._lock:
            reply = self.llama.create_chat_completion(messages, max_tokens=max_tokens, temperature=temperature, seed=seed, response_format=response_format)
        text = reply["choices"][0]["message"]["content"] or ""
        return text if accept is None else accept(text)


def prompt(scenario, number, seed=0):
    """What the LLM is asked for example `number` of a scenario: str. The style depends on scenario, number and seed."""
    style = random.Random(f"{seed}-{scenario}-{number}").choice(STYLES)
    return (_PAIR if scenario == NEAR_MISS else _TRIPLE).format(topic=SCENARIOS[scenario], style=style)


def check(text, scenario, pool):
    """Read a reply and decide whether it is kept.

    Args:
        text: the reply.
        scenario: of SCENARIOS.
        pool: Pool.
    Returns:
        (row, "kept") with row {"question", "accepted", "rejected"} or {"question", "answer", "label": 0}; or (None, reason)
    Example:
        check("Sure!", "06-fraud", Pool())  # (None, 'no JSON object')
    """
    names = ("question", "answer") if scenario == NEAR_MISS else ("question", "accepted", "rejected")
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start:end + 1], strict=False)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return None, "no JSON object"
    row = {name: found.get(name) for name in names}
    for name, value in row.items():
        if not isinstance(value, str):
            return None, f"{name} is not a text"
        row[name] = value = value.strip()
        least, most = _LIMITS[name]
        if not least <= len(value) <= most:
            return None, f"{name} has not {least} to {most} characters"
    if scenario != NEAR_MISS:
        if data.folded(row["accepted"]) == data.folded(row["rejected"]):
            return None, "accepted and rejected are the same"
        if is_refusal(row["rejected"]):
            return None, "rejected refuses"
    elif is_refusal(row["answer"]):
        return None, "answer to a near miss refuses"
    if pool.has(row["question"]):
        return None, "question is in the pool"
    return row if scenario != NEAR_MISS else {**row, "label": 0}, "kept"


def generate(config, chat, progress=True):
    """Ask for every example that isn't there yet, and keep what `check` lets through.

    Args:
        config: GenerateConfig.
        chat: Endpoint or LocalChat.
    Returns:
        the report, dict: requests, kept, and dropped by reason, over all and by scenario, with these settings alone; and how
        many rows OUT has with others.
    Raises:
        EndpointError: the server gave no answer to many requests in a row; what was kept stays, and the next start goes on.
        DataError: OUT or its log isn't this module's; it stays as it is.
    """
    out, log = Path(config.out), Path(config.out + ".log.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(config, chat)
    kept, done = _lines(out, "question", "key"), {line["key"]: line["status"] for line in _lines(log, "key", "status")}
    _close(out)
    _close(log)
    done |= {row["key"]: "kept" for row in kept}
    pool = Pool(row["question"] for row in kept)
    for path in config.pool:
        pairs, triples = data.read(path)
        for row in (*pairs, *triples):
            pool.add(row.question)
    # Without an answer nothing is decided: such a request is made again.
    todo = [(scenario, i) for i in range(config.each) for scenario in config.scenarios
            if done.get(_key(settings, scenario, i), "no answer") == "no answer"]
    lock, misses, reason = threading.Lock(), 0, ""
    options = {"response_format": {"type": "json_object"}} if config.json_mode else {}
    bar = tqdm(total=len(todo), disable=not progress, desc="generate", unit="request")

    def ask(item):
        nonlocal misses, reason
        (scenario, i), missing = item, ""
        if misses >= GIVE_UP:
            return
        try:
            reply = chat.chat([{"role": "user", "content": prompt(scenario, i, config.seed)}], config.tokens, config.temperature,
                              seed=random.Random(f"{config.seed}-{scenario}-{i}-sampling").randrange(2**31), **options)
        except EndpointError as error:
            reply, reason, missing = None, str(error), "not taken by the server" if isinstance(error, PromptError) else "no answer"
        with lock:  # the pool decides in one place: two workers can't keep the same question
            misses = misses + 1 if missing == "no answer" else 0
            row, status = check(reply, scenario, pool) if reply is not None else (None, missing)
            key = _key(settings, scenario, i)
            if row:
                pool.add(row["question"])
                _append(out, {**row, "source": "generated", "scenario": scenario, "model": chat.model, "prompt_version": PROMPT_VERSION,
                              "seed": config.seed, "temperature": config.temperature, "key": key})
            _append(log, {"key": key, "scenario": scenario, "status": status})
            done[key] = status
            bar.update()

    with ThreadPoolExecutor(config.workers if isinstance(chat, Endpoint) else 1) as workers:
        list(workers.map(ask, todo))
    bar.close()
    report = _report(config, chat, done)
    with whole_file(config.out + ".report.json") as partial:
        Path(partial).write_text(json.dumps(report, indent=1) + "\n")
    if misses >= GIVE_UP:
        raise EndpointError(f"generate: the server must answer, got nothing for {misses} requests in a row. A new start goes on. At the last: {reason}")
    return report


def _settings(config, chat):
    """Whatever a reply hangs on: with another of these a request is a new one."""
    return (f"seed {config.seed}, prompts {PROMPT_VERSION}, temperature {config.temperature}, {config.tokens} tokens, "
            f"{'JSON' if config.json_mode else 'text'}, {chat.model}")


def _key(settings, scenario, i):
    return f"{scenario}/{i}/{settings}"


def _lines(path, first, second):
    """Rows with these names of a file that this module appends to, without a line that was cut; DataError if the file is another's."""
    content, rows = path.read_bytes() if path.exists() else b"", []
    for line in content.split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    begin = b'{"%s": ' % first.encode()
    is_cut = b"\n" not in content and content.startswith(begin[:len(content)])  # no more than the beginning of a first row
    if not (rows or is_cut) or any(not isinstance(row, dict) or not {first, second} <= row.keys() for row in rows):
        raise DataError(f"generate: out must be a file that generate wrote, got another at {path}. Choose a new one.")
    return rows


def _close(path):
    """A line that an interruption cut goes; a whole one without its end gets it."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        whole, last = content[:content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1:]
        try:
            json.loads(last)
            whole = content + b"\n"
        except ValueError:
            pass
        with whole_file(path) as partial:
            Path(partial).write_bytes(whole)


def _append(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")  # ASCII: half an emoji is no UTF-8


def _report(config, chat, done):
    by_scenario, others, settings = {}, 0, _settings(config, chat)
    for key, status in done.items():
        scenario, *_, made_with = key.split("/", 2)  # a model's name may have more of them
        if made_with == settings:
            by_scenario.setdefault(scenario, Counter())[status] += 1
        else:
            others += status == "kept"
    total = sum(by_scenario.values(), Counter())
    return {"config": asdict(config), "model": chat.model, "prompt_version": PROMPT_VERSION, "requests": sum(total.values()), "kept": total["kept"],
            "kept_with_other_settings": others,
            "dropped": {reason: n for reason, n in total.most_common() if reason != "kept"},
            "scenarios": {name: dict(counts) for name, counts in sorted(by_scenario.items())}}


def run(config):
    """`protector generate`: make the chat that the configuration names, generate, and say what came of it on stderr.

    Returns:
        0
    Raises:
        ValueError: neither or both of url and gguf, an unknown scenario, or more tokens than a GGUF model's context holds.
    """
    unknown = [name for name in config.scenarios if name not in SCENARIOS]
    if unknown or not config.scenarios:
        raise ValueError(f"generate: scenarios must be some of {', '.join(SCENARIOS)}, got {', '.join(unknown) or 'none'}.")
    if bool(config.url) == bool(config.gguf) or config.url and not config.model:
        raise ValueError("generate: either url and model, or gguf must be given. Pass --url URL --model NAME, or --gguf FILE.")
    if config.gguf and not 1 <= config.tokens <= _CONTEXT - _PROMPT:
        raise ValueError(f"generate: tokens must be 1 to {_CONTEXT - _PROMPT} with gguf, got {config.tokens}. "
                         f"The context has {_CONTEXT} tokens, of which {_PROMPT} are the prompt's. Ask a server for longer replies.")
    if config.url:
        chat = Endpoint(config.url, config.model, config.timeout_s)
    else:
        from .base import DEFAULT, base_path

        chat = LocalChat(base_path() if config.gguf == DEFAULT else config.gguf)
    report = generate(config, chat, progress=sys.stderr.isatty())
    print(f"kept {report['kept']} of {report['requests']} in {config.out}; dropped: "
          + (", ".join(f"{n} {reason}" for reason, n in report["dropped"].items()) or "none"), file=sys.stderr)
    return 0
