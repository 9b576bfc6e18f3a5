"""Ask `pi-attention serve` by OpenAI's client, and print the text as it comes.

    pi-attention serve runs/demo &
    python examples/ask_server.py --prompt "It was"

The client comes with the extra: pip install 'pi-attention[serve]'.
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="It was")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key="none")  # the server asks for no key
    model = client.models.list().data[0].id
    parts = client.completions.create(
        model=model,
        prompt=options.prompt,
        max_tokens=options.tokens,
        temperature=options.temperature,
        stream=True,
    )
    print(options.prompt, end="")
    for part in parts:
        print(part.choices[0].text, end="", flush=True)
        usage = part.usage
    print(f"\n{model}: {usage.completion_tokens} tokens after {usage.prompt_tokens}")


if __name__ == "__main__":
    main()
