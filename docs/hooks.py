"""Generate pages of the site from the code: the references, the lessons, the decisions, README's results."""

import dataclasses
import inspect
import json
import os
import re
from pathlib import Path

import griffe
import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from convlens.cli.main import app
from convlens.models import MODELS, model_options
from convlens.training.recipe import FIELD_TYPES, Recipe
from convlens.training.recipes import RECIPES, get_recipe

ROOT = Path(__file__).parent.parent
RUN_LESSONS = "CONVLENS_RUN_LESSONS"  # set to 1 to run the lessons (many minutes) and show their outputs


def on_config(config):
    """Add the lessons to the navigation."""
    lessons = sorted(Path(config.docs_dir, "lessons").glob("*.ipynb"))
    if lessons:
        config.nav.insert(2, {"Lessons": ["lessons/index.md", *(f"lessons/{path.stem}.md" for path in lessons)]})
    return config


def on_files(files, config):
    """Add a page for each notebook, next to the notebook itself."""
    for path in sorted(Path(config.docs_dir, "lessons").glob("*.ipynb")):
        files.append(File.generated(config, f"lessons/{path.stem}.md", content=lesson(path)))
    return files


def on_page_markdown(markdown, **_):
    """Replace marks such as ``<!-- generated: cli -->`` by generated Markdown, and link to the pages of lessons."""
    markdown = re.sub(r"(]\([\w/.-]+)\.ipynb\)(?!\{ download)", r"\1.md)", markdown)
    makers = {
        "cli": command_line,
        "decisions": decisions,
        "fields": fields,
        "headline": headline,
        "models": models,
        "recipes": recipes,
    }
    return re.sub(r"<!-- generated: (\w+) -->", lambda mark: makers[mark[1]](), markdown)


def headline():
    """Return README's table of results."""
    found = re.search(r"<!-- headline -->\n(.*?)<!-- end", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    if not found:
        raise PluginError("README.md has no <!-- headline --> mark")
    return found[1]


def decisions():
    """Return a list of the decision records: each file's number, and its title as a link."""
    lines = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title = path.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- {path.stem[:4]}: [{title}]({path.name})\n")
    return "".join(lines)


def table(head, rows):
    """Return a Markdown table."""
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows)) + "\n"


def command_line():
    """Return every command with its help, arguments, options and examples."""
    top = typer.main.get_command(app)
    return describe_options(top, "convlens") + "".join(verbs(top, "convlens"))


def verbs(group, name):
    """Yield the Markdown of each subcommand."""
    for verb, command in group.commands.items():
        full = f"{name} {verb}"
        if hasattr(command, "commands"):
            yield from verbs(command, full)
            continue
        text, _, examples = inspect.cleandoc(command.help).partition("Examples:")
        usage = command.get_usage(command.make_context(full, [], resilient_parsing=True)).removeprefix("Usage: ")
        lines = "\n".join(line for line in inspect.cleandoc(examples).splitlines() if line)
        yield f"## {full}\n\n{text}\n\n```text\n{usage}\n```\n{describe_options(command, full)}"
        yield f"```sh\n{lines}\n```\n\n" if lines else ""


def describe_options(command, name):
    """Return a table for each help panel of a command's arguments and options."""
    context = command.make_context(name, [], resilient_parsing=True)
    panels = {}
    for parameter in command.get_params(context):
        if parameter.name != "help":
            words, text = parameter.get_help_record(context)
            panels.setdefault(parameter.rich_help_panel or "", []).append((f"`{words}`", text))
    return "".join(
        (f"\n**{panel}**\n" if panel else "") + table(("argument or option", "meaning"), rows)
        for panel, rows in panels.items()
    )


def fields():
    """Return the table of a recipe's fields."""
    rows = []
    for item in dataclasses.fields(Recipe):
        kind = getattr(FIELD_TYPES[item.name], "__name__", str(FIELD_TYPES[item.name]))
        takes = "".join(f", `{choice}`" for choice in item.metadata["choices"])
        takes += "" if item.metadata["low"] is None else f", at least {item.metadata['low']}"
        rows.append((f"`{item.name}`", f"`{kind}`{takes}", f"`{item.default!r}`", item.metadata["help"]))
    return table(("field", "values", "default", "meaning"), rows)


def recipes():
    """Return every named recipe: its docstring, and the fields that differ from the defaults."""
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}
    parts = []
    for name in RECIPES.names():
        own = dataclasses.asdict(get_recipe(name))
        differs = ", ".join(f"{k}={v!r}" for k, v in own.items() if v != defaults[k] and k != "name")
        parts.append(
            f"### {name}\n\n{to_markdown(inspect.getdoc(RECIPES[name]))}\n\n```python\nRecipe({differs})\n```\n"
        )
    return "\n".join(parts)


def models():
    """Return every model by name: its docstring and its options."""
    parts = []
    for name in MODELS.names():
        options = ", ".join(f"`{option}={default!r}`" for option, default in model_options(name).items())
        parts.append(f"### {name}\n\n{to_markdown(inspect.getdoc(MODELS[name]))}\n\nOptions: {options or 'none'}.\n")
    return "\n".join(parts)


def to_markdown(docstring):
    """Return a docstring as Markdown: examples as code, roles such as :func: as links."""
    text = re.sub(r":\w+:`(convlens\.[\w.]+)`", r"[`\1`][\1]", docstring)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"(?m)(^>>> (?:.+\n?)+)", r"```pycon\n\1\n```\n", text)


def lesson(path):
    """Return a notebook as Markdown; with outputs if CONVLENS_RUN_LESSONS is 1."""
    notebook = json.loads(path.read_text("utf-8"))
    if os.environ.get(RUN_LESSONS) == "1":
        notebook = run(path)
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(prose(source) if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [show(output) for output in cell.get("outputs", ())]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[This lesson as a notebook]({path.name}){{ download }}\n{rest}\n"


def prose(text):
    """Return a notebook's Markdown without links to files outside the site, and with formulas as MathML."""
    text = re.sub(r"\[([^]]+)]\(\.\./\.\./[^)]*\)", r"\1", text)  # not a page of the site
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: formula(found[1], "block"), text, flags=re.DOTALL)
    return re.sub(r"(?<![\\\w$])\$([^$`\n]+)\$(?!\w)", lambda found: formula(found[1], "inline"), text)


def formula(latex, display):
    """Return a formula as MathML."""
    from latex2mathml.converter import convert

    return convert(latex, display=display)


def run(path):
    """Run a notebook in a temporary folder and return it with its outputs."""
    import tempfile

    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        return NotebookClient(
            nbformat.read(path, as_version=4), timeout=600, resources={"metadata": {"path": folder}}
        ).execute()


def show(output):
    """Return one output of a cell: its image, or else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Output of the cell above](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    text = "".join(output.get("text") or data.get("text/plain") or output.get("traceback") or "")
    return f"```text\n{text.rstrip()}\n```"


class OurDocstrings(griffe.Extension):
    """Convert docstrings to Markdown: examples become code, and roles such as :func: become links."""

    def on_instance(self, *, obj, **_):
        """Convert the docstring of one object; append the comments of a dataclass's fields."""
        if obj.docstring is None:
            return
        text = to_markdown(inspect.cleandoc(obj.docstring.value))
        if obj.is_class:
            fields = re.findall(r"(?m)^    (\w+): (.+?)(?: = [^#\n]+)?  # (.+)$", obj.source)
            text += "\n\n" + "\n".join(f"- `{name}`: `{kind}`; {comment}" for name, kind, comment in fields)
        obj.docstring.value = text
