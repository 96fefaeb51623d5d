"""The texts and chats over which a bundle's tokenizer is compared with transformers'."""

from __future__ import annotations

from collections.abc import Iterable

SCRIPTS = (
    "Once upon a time, there was a little boy called Felix.",
    "It's what we'll do, don't they'd say I'VE?!  \u201cQuotes\u201d \u2014 dash\u2026",
    "Stra\u00dfe, na\u00efve caf\u00e9, \u0130stanbul, \u0152uvre, \ufb01nd",
    "cafe\u0301 in two ways: caf\u00e9",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    "\u6211\u80fd\u541e\u4e0b\u73bb\u7483\u800c\u4e0d\u4f24\u8eab\u4f53\u3002 \u5168\u89d2\uff21\uff22\uff13",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u064b\u0627 \u0628\u0643\u060c \u0661\u0662\u0663",
    "\u05e9\u05c1\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U00020000\U0001d49c \u2581\u2581under \u0120\u010a",
)
CODE = (
    "def f(x: int) -> str:\n    if x >= 10:\n\t\treturn f'{x!r:>8}'\n\n\nclass A: pass  # end\n",
    'for (i=0;i<n;++i){a[i]^=~b->c&&d||!e;} /* {"k": [1, 2.5e-3, null]} */\r\n',
    "SELECT * FROM t WHERE a<>'b'; camelCase snake_case_name __init__ https://a.b/c?d=e&f#g",
)
SPACES = (
    "", " ", "  ", "   ", "\n", "\n\n\n", "\t", "\r\n", " \n \t ", "a  b   c     d" + " " * 40 + "e",
    " leading", "trailing ", "\u00a0no-break\u3000wide\u2009thin\u200bzero\ufeff",
)  # fmt: skip
NUMBERS = (
    "0 1 23 456 7890 12345678901234567890",
    "3.14159 -1,000,000.50 1e-9 0xFF 12:34",
    "\u00b2\u00bd\u2167",
)
CONTROLS = ("\x00\x01\x1b[31m\x7f\x85", "a\u2028b\u2029c\u0000d", "\ufffd\ufffe\U0010ffff")
LONG = ("a" * 700, "Donaudampfschifffahrtsgesellschaft" * 12, "=" * 130 + "ab" * 200, "\u6f22" * 150)
TEXTS = (*SCRIPTS, *CODE, *SPACES, *NUMBERS, *CONTROLS, *LONG)

USER = {"role": "user", "content": " Who <b>are</b> you? \u20ac\n"}
ANSWER = {"role": "assistant", "content": "Me.\n\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: tuple[list[dict[str, str]], ...] = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER],
    [USER, ANSWER],
)


def around(tokens: Iterable[str]) -> list[str]:
    """Texts with each token inside, with and without spaces beside it."""
    forms = ("a{}b", "a {} b", "{0}{0}\n{0}  c")
    return [form.format(token) for token in tokens for form in forms]
