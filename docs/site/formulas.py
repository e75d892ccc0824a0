"""Docstrings write formulas as plain text; a browser shows them as MathML, which needs no script and no font file."""

import re
from html import escape

from latex2mathml.converter import convert

GREEK = {"alpha", "beta", "gamma", "eta", "lambda", "theta"}
FUNCTIONS = {"softmax", "sigmoid", "onehot", "argmax", "mean", "corr", "diag", "std", "Var", "KL", "CE"}
FUNCTIONS |= {"log", "exp", "max", "min", "cosh"}
SIGNS = {
    "||": r"\,\Vert\,",
    "!=": r"\ne ",
    ">=": r"\ge ",
    "<=": r"\le ",
    "...": r"\ldots ",
    "*": r"\cdot ",
    "~": r"\,\sim\,",
    ".": r"\cdot ",
    "{": r"\{",
    "}": r"\}",
}
TOKEN = re.compile(
    r"""(?P<over>(?:softmax|sum|mean|E)\ over\ .+?\ of\ )
    |(?P<belongs>not\ in\b|(?<=\w\ )in(?=\ [A-Z]\b))
    |(?P<root>sqrt\ (?P<radicand>\w+)|sqrt\((?P<inner>[^()]*)\))
    |(?P<power>\^\((?P<exponent>[^()]*)\)|\^\w+)
    |(?P<number>\d+\.\d+)
    |(?P<tiny>\b1e-(?P<digits>\d+))
    |(?P<fraction>\b(?P<top>\d)/(?P<bottom>\d)\b)
    |(?P<text>[A-Za-z]{2,}(?:-[A-Za-z]{2,})+)
    |(?P<angle><(?=\w)[^<>]*>)
    |(?P<word>[A-Za-z]+(?:_[A-Za-z]{2,})*'?(?:_\.?\w+)?)
    |(?P<below>_\w+)
    |(?P<sign>\|\||!=|>=|<=|\.\.\.|[*~.{}])
    |(?P<space>\ +)
    |(?P<other>.)""",
    re.VERBOSE,
)


def tex(formula: str) -> str:
    """One line of a docstring's formula, ``softmax over k != y of t / T``, as TeX."""
    joined = "".join(_part(match) for match in TOKEN.finditer(formula))
    # TeX drops spaces outside of texts: those between two words, and between a word and a symbol.
    joined = re.sub(r"(\\text\{[^{}]*)\} (?=[\w(\\])(?!\\(?:cdot|sim|in|ne|notin|[gl]e) )", r"\1 }", joined)
    joined = re.sub(r"(?<=[\w)},]) \\text\{", r"\\text{ ", joined)
    return re.sub(r"(\\text\{[^{}]*)\}\\text\{", r"\1", joined)


def _part(match: re.Match[str]) -> str:
    token = match.group()
    kind = next(name for name in TOKEN.groupindex if match[name] is not None)
    match kind:
        case "over":
            function, _, rest = token.partition(" over ")
            below = tex(rest.removesuffix(" of "))
            return (r"\sum" if function == "sum" else rf"\mathop{{\mathrm{{{function}}}}}") + rf"_{{{below}}} "
        case "belongs":
            return r"\notin " if token == "not in" else r"\in "
        case "root":
            return rf"\sqrt{{{tex(match['radicand'] or match['inner'])}}}"
        case "power":
            return rf"^{{{tex(match['exponent'] or token[1:])}}}"
        case "tiny":
            return rf"10^{{-{match['digits']}}}"
        case "fraction":
            return rf"\tfrac{{{match['top']}}}{{{match['bottom']}}}"
        case "text":
            return rf"\text{{{token}}}"
        case "angle":
            return rf"\langle {tex(token[1:-1])}\rangle "
        case "word":
            if re.match("[A-Za-z]+", token).group() not in FUNCTIONS:  # type: ignore[union-attr]
                return _word(token)
            before, after = match.string[: match.start()], match.string[match.end() :]
            # Of a function's name a browser makes no operator that keeps its distance.
            apart = r"\," if re.search(r"(?:(?<![A-Za-z])\w|[)'\d]) $", before) else ""
            return apart + _word(token) + (r"\," if re.match(r" [\w(|<]", after) else "")
        case "below":
            return rf"_{{{token[1:]}}}"
        case "sign":
            return SIGNS[token]
        case "space":
            return " "
    return token


def _word(token: str) -> str:
    if re.fullmatch(r"[a-z]{2,}_[a-z_]{2,}", token):  # a hyper-parameter
        return rf"\text{{{token}}}"
    if re.fullmatch("[A-Z][a-z]", token):  # Tc
        return f"{token[0]}_{token[1]}"
    name, _, below = token.partition("_")
    name, prime = name.rstrip("'"), "'" * name.count("'")
    below = below.replace(".", r"\cdot ")  # P_.k
    index = f"_{{{below}}}" if below else ""
    if name in GREEK | {"sum"}:
        return rf"\{name}{prime}{index} "
    if name in FUNCTIONS:
        return rf"\operatorname{{{name}}}{prime}{index}"
    if len(name) == 1:
        return name + prime + index
    return rf"\mathrm{{{name}}}{prime}{index}" if name.isupper() or index else rf"\text{{{name}}}"


def is_prose(segment: str) -> bool:
    """Whether a piece of a line is a remark, as "averaged over the batch" is."""
    if re.fullmatch(r"\(.*[a-z]{3}.*\)|rows|columns", segment):
        return True
    words = [word for word in re.findall("[A-Za-z]{2,}", segment) if word not in FUNCTIONS | GREEK]
    return len(words) > 1 and sum(map(len, words)) > 0.5 * len(segment.replace(" ", ""))


def display(block: str) -> str:
    """The lines of a block of formulas, aligned at their first equals sign, as one line of HTML."""
    rows = []
    for line in block.strip().splitlines():
        whole = re.sub(r" +(=|&) ", r" \1 ", line.strip())
        left, equals, right = whole.partition(" = ")
        if not equals or re.search("[(,]$|  | over ", left) or ("(" in left and ")" not in left):
            left, equals, right = "", "", whole
        first, *others = re.split(" {2,}", right)
        row = (rf"{tex(left)} & = " if equals else "& ") + tex(first)
        for piece in others:
            # What a letter stands for has a line of its own.
            if row.endswith(",") and " = " in piece and not is_prose(piece):
                rows.append(row)
                row = r"& \quad " + tex(piece)
            else:
                row += r" \quad " + (rf"\text{{{piece}}}" if is_prose(piece) else tex(piece))
        rows.append(row)
    aligned = r"\begin{align*}" + r" \\ ".join(rows) + r"\end{align*}"
    return f'<div class="formula">{_mathml(aligned, "block")}</div>'


def inline(formula: str) -> str:
    """A formula in a sentence."""
    return f'<span class="formula">{_mathml(tex(formula), "inline")}</span>'


def is_formulas(block: str) -> bool:
    """Whether an indented block of a docstring holds formulas, and not code."""
    return not re.search(r"^(?:@|import |from |def |class \w+[(:]|python )|\"|\w\(\)", block, re.MULTILINE)


def is_formula(code: str) -> bool:
    """Whether what a docstring sets in double backticks is a formula, and not code."""
    if re.search(r"[\"@\[]|\w=\w|\*\*|[a-z]\.[a-z]|^\(", code) and "KL(" not in code:
        return False
    return bool(re.search(r"\^| (?:\*|\+|\|\||=|<|>=|<=) |^(?:softmax|std|sqrt)\(", code))


def _mathml(source: str, shown: str) -> str:
    mathml: str = convert(source, display=shown)
    mathml = re.sub("<mo>([A-Za-z]+)</mo>", r"<mi>\1</mi>", mathml)
    # For those who copy a formula, or hear it.
    return mathml.replace("<math ", f'<math alttext="{escape(source)}" ', 1).replace("\n", " ")
