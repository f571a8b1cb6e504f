"""Keeping secrets out of what is written and shown: variables, URLs and texts with secret parts replaced by ***.

A name can say that a value is secret (`WANDB_API_KEY`), and so can a value (`https://user:password@host`, `hf_...`).
Neither finds every secret: what may hold one is also written for its owner alone. Imports no torch.
"""

import re
from typing import Any

MASK = "***"

# Words of a name, as in HF_TOKEN. "KEY" and the like also have harmless meanings, in a program's own text above all.
_CLEAR = (
    *("PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE", "PASSCODE", "PGPASSWORD", "APIKEY", "SECRET", "SECRETS"),
    *("CREDENTIAL", "CREDENTIALS", "CREDS", "JWT", "KEYTAB", "AUTHORIZATION"),
)
_VAGUE = (
    *("KEY", "KEYS", "TOKEN", "PASS", "PW", "PWD", "CRED", "AUTH", "PAT", "SAS", "DSN", "COOKIE", "SESSION"),
    *("CERT", "CERTIFICATE", "SIG", "SIGNATURE", "PRIVATE", "WEBHOOK", "BEARER", "NETRC"),
)
_PAIRS = ("API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "SECRET_KEY", "ACCOUNT_KEY", "SIGNING_KEY", "ENCRYPTION_KEY")
_PAIRS += ("SSH_KEY", "AUTH_KEY", "ACCESS_TOKEN", "AUTH_TOKEN", "API_TOKEN", "REFRESH_TOKEN", "BEARER_TOKEN")
_NOT_SECRET = {"PWD", "OLDPWD"}  # the shell's working folders
_ENDINGS = ("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY")
_ENDINGS += ("SSHPASS", "DBPASS")  # of words written as one, as in HFTOKEN

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_USER_AND_PASSWORD = re.compile(r"(?<!github)(?<!git)(://[^\s/:@\[\]]*):(?!:)([^\s/]*)@")  # github://owner:name@branch
_PASSWORD_WITH_SLASH = re.compile(
    r"(?<!github)(?<!git)(://[^\s/:@\[\]]*):(?!:|\d*(?:[/?#]|$)|\*\*\*@)[^\s@\"']{0,200}@"
)
_TOKEN_AS_USER = re.compile(r"(\bhttps?://)[^\s/:@?#]+@")
_PARAMETER = re.compile(r"([?&;])([\w.~%-]+)=([^\s&;#\"']*[^\s&;#\"':,])")  # a message may go on with a colon
_ASSIGNMENT = re.compile(
    r"""(?<![\w.-])(?P<name>-{0,2}[A-Za-z_][\w.-]*)(?P<sign>["']?\s*(?::=|=>|[=:])\s*)(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s"',;&(){}\[\]]+)"""
)
_FLAG = re.compile(r"""(?<![\w-])(?P<name>--[\w-]+)(?P<sign>\s+)(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s"'-]\S*)""")
_USER_FLAG = re.compile(r"(?<!\S)(-u|--user|--proxy-user)([ =]?['\"]?[^\s:'\"/]+):[^\s'\"]+")  # of curl
_AUTHORIZATION = re.compile(r"""(?i)(\bauthorization["']?\s*[:=]\s*["']?[a-z-]+\s+)[^\s"']+""")  # Token, Digest, ...
_HEADER = re.compile(r"(?i)\b(basic|bearer)\s+[A-Za-z0-9+/=._~-]{8,}")
_WEBHOOK = re.compile(r"(https://hooks\.[\w.-]+/)\S*[^\s:,]")
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_KNOWN_FORMS = re.compile(
    r"""(?<![\w-])(?:
    (?:AKIA|ASIA)[0-9A-Z]{16}                    # AWS
    | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,}
    | hf_[A-Za-z0-9]{16,} | sk-[\w-]{16,} | xox[abprs]-[\w-]{8,} | AIza[\w-]{30,} | npm_[A-Za-z0-9]{16,}
    | pypi-[\w-]{16,} | dop_v1_[0-9a-f]{16,}
    | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?       # a JSON web token
    )""",
    re.VERBOSE,
)
_NO_VALUES = {"", "str", "bytes", "int", "bool", "None", "null", "True", "False", MASK}  # of a field with a clear name
_LITERAL = re.compile(r"(?=.*[A-Za-z])(?=.*\d)[\w+/=~-]{8,}")


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name is likely to hold a secret: KEY, TOKEN or PASSWORD as a word of it."""
    words = {word.upper() for word in _WORDS.findall(name)}
    known = not words.isdisjoint((*_CLEAR, *_VAGUE)) or any(word.endswith(_ENDINGS) for word in words)
    return known and name not in _NOT_SECRET


def redact_urls(text: str) -> str:
    """The text without the passwords, tokens and signatures of its URLs."""
    text = _USER_AND_PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _PASSWORD_WITH_SLASH.sub(rf"\1:{MASK}@", text)
    text = _TOKEN_AS_USER.sub(rf"\1{MASK}@", text)
    text = _WEBHOOK.sub(rf"\1{MASK}", text)
    if "://" not in text:
        return text
    return _PARAMETER.sub(lambda found: _mask_parameter(*found.groups()), text)


def find_secret_url(tree: Any) -> tuple[str, str] | None:
    """Path and masked text of the first URL with a password or token in a tree of plain values; None without any."""
    rest = [("", tree)]
    while rest:
        path, value = rest.pop()
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        rest += [(f"{path}.{key}" if path else str(key), each) for key, each in reversed(list(inner))]
        if isinstance(value, str) and redact_urls(value) != value:
            return path, redact_urls(value)
    return None


def redact_message(text: str) -> str:
    """The text of an error or a note, without secrets in URLs and in the forms of known services.

    Words after names are left: "api_key: must be text" is what a message looks like.
    """
    text = _KNOWN_FORMS.sub(MASK, _KEY_BLOCK.sub(MASK, redact_urls(text)))
    text = _AUTHORIZATION.sub(rf"\1{MASK}", _HEADER.sub(rf"\1 {MASK}", text))
    return _USER_FLAG.sub(rf"\1\2:{MASK}", text)


def redact(text: str) -> str:
    """The text of a file, without what looks like a secret: as `redact_message`, and values after names that say so."""
    return _FLAG.sub(_mask_value, _ASSIGNMENT.sub(_mask_value, redact_message(text)))


def redact_variable(name: str, value: str) -> str:
    """The value of an environment variable, as far as it may be shown."""
    return MASK if is_secret_name(name) else redact(value)


def _mask_parameter(before: str, name: str, value: str) -> str:
    return f"{before}{name}={MASK if is_secret_name(name) else value}"


def _mask_value(found: re.Match[str]) -> str:
    """`NAME=value`, `name: value`, `--name value`; what a program calls a key or a token is often none."""
    name, sign, value = found["name"], found["sign"], found["value"]
    if not is_secret_name(name):
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    inner = value.strip(quote) if quote else value
    words = [word.upper() for word in _WORDS.findall(name)]
    clear = not set(words).isdisjoint(_CLEAR) or any(pair in "_".join(words) for pair in _PAIRS)
    clear = clear or any(word.endswith(_ENDINGS) and word != "TOKEN" for word in words)
    secret = (
        bool(_LITERAL.fullmatch(inner))
        or (clear and inner not in _NO_VALUES)
        or (name.isupper() and (sign == "=" or (quote != "" and len(inner) >= 8 and " " not in inner)))
    )
    return f"{name}{sign}{quote}{MASK}{quote}" if secret else found[0]
