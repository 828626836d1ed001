"""The article's model made right: see docs/article.md."""

from gptjax.presets import article_gpt35

config = article_gpt35()
