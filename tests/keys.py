"""Two tenants and a stranger ask a running Baton through the official OpenAI client, which must raise what its users catch.

    python3 keys.py http://127.0.0.1:8000/v1 MODEL KEY_OF_THREE_REQUESTS KEY_OF_TOKENS
"""

import sys

import openai

base_url, model, counted, metered = sys.argv[1:5]
MESSAGES = [{"role": "user", "content": "What does `Vec::push` do?"}]


def client(key):
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def ask(key, **more):
    completions = client(key).chat.completions
    return completions.with_raw_response.create(model=model, messages=MESSAGES, temperature=0, **more)


def raised(kind, ask):
    try:
        ask()
    except kind as error:
        return error
    raise SystemExit(f"no {kind.__name__}")


for stranger in ("none", counted[:-1] + ("0" if counted[-1] != "0" else "1")):
    error = raised(openai.AuthenticationError, lambda: ask(stranger))
    assert (error.status_code, error.code) == (401, "invalid_api_key"), error
    raised(openai.AuthenticationError, lambda: client(stranger).models.list())

# Three requests a minute: three, and no fourth.
for left in ("2", "1", "0"):
    headers = ask(counted, max_tokens=4).headers
    assert headers["x-ratelimit-limit-requests"] == "3", headers
    assert headers["x-ratelimit-remaining-requests"] == left, headers
error = raised(openai.RateLimitError, lambda: ask(counted, max_tokens=4))
headers = error.response.headers
assert (error.code, error.type) == ("rate_limit_exceeded", "requests"), error
assert 0 < int(headers["retry-after-ms"]) <= 20_000, headers
assert int(headers["retry-after"]) == -(-int(headers["retry-after-ms"]) // 1000), headers
# A stream is refused before it begins, and as plainly.
error = raised(openai.RateLimitError, lambda: ask(counted, stream=True))
assert error.type == "requests", error

# A thousand tokens a minute, which the other tenant's haste does not touch: what is asked for counts, and what is used remains.
answer = ask(metered, max_tokens=500)
used, headers = answer.parse().usage.total_tokens, answer.headers
assert headers["x-ratelimit-limit-tokens"] == "1000", headers
assert 1000 - used <= int(headers["x-ratelimit-remaining-tokens"]) <= 1000 - used + 100, (used, headers)
error = raised(openai.RateLimitError, lambda: ask(metered, max_tokens=999))
assert (error.code, error.type) == ("rate_limit_exceeded", "tokens"), error

# The client itself waits as told, and then succeeds.
patient = openai.OpenAI(base_url=base_url, api_key=metered, max_retries=3)
patient.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=960)
error = raised(openai.BadRequestError, lambda: ask(metered, max_tokens=1, extra_body={"priority": -5}))
assert error.param == "priority", error
print("as it should be")
