"""Hostile values of flags, fields of configs, fields of JSON, environment variables."""

NINES = "9" * 23
NUMBERS = ["0", "-1", "1", "2", "1.5", "1e300", "1e-320", "nan", "inf", "-inf", NINES, "9" * 5000, "0x10"]
NUMBERS += [
    "1_0",
    "",
    "x",
    "\uff11",
    " 1 ",
    "--",
    "2147483648",
    "9223372036854775808",
    "1e39",
    "-0",
    "1/0",
    "0/1",
    "3/2",
    "9999M",
]
TEXTS = ["", " ", "\n", "\udcff", "\u00e9" * 200, "x" * 5000, "x" * 300, "x/" * 3000, "-", ".."]
TEXTS += [
    "~nobody/x",
    "*",
    "[",
    "a=b",
    "=",
    "{}",
    "%s",
    "\x1b[2J",
    "\U0001f642",
    "pipe:false",
    "pipe:",
    "pipe:cat a 'b",
    "nope://x",
]
TEXTS += [
    "memory://x",
    "file:///nowhere",
    "{000..999}",
    "{0..999999999}",
    ":",
    ",",
    "null",
    "\u2028",
    "a\tb",
    "text",
    "byte",
]
VALUES = [*NUMBERS, "!!int ''", "!!bool maybe", "!!python/object/apply:os.getcwd []", "[local]", "{}", "[]"]
VALUES += [
    "&a [*a]",
    "[[[[",
    '"a\\0b"',
    '"\\ud800"',
    "null",
    "true",
    "~",
    "~/x",
    "1:30:00",
    "*a",
    "? a",
    "%",
    "@",
    "`",
    "[1, 2]",
]
VALUES += ["../x", "/", "'x' y", "!x y", "{a: b}", "[{}]", "[" * 400, "a: b: c", "<<", "=", "|", ">", "1e5"]
VALUES += [
    "64",
    "8",
    "|\n x",
    "{kind: null}",
    "{kind: [full]}",
    "{kind: full}",
    "{kind: rmt, memory_tokens: 99999}",
    "'" + "x" * 300 + "'",
]
JSON_VALUES = [None, True, -1, 0, 1, 2**40, 2**63, 10**30, 1e300, 1.5, "", "x", "\ud800", "a\0b", "../../x", [], {}]
JSON_VALUES += [[[]], "x" * 300, {"": None}, [None], float("nan"), float("inf"), "9" * 30, "/", "~"]
ENVIRONMENTS = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS"]
ENVIRONMENTS += ["SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"]
ENVIRONMENTS += [
    "INFINI_TRAIN_RESTARTS",
    "HOME",
    "COLUMNS",
    "TMPDIR",
    "LC_ALL",
    "PYTHONIOENCODING",
    "OMP_NUM_THREADS",
    "NO_COLOR",
    "TERM",
]
