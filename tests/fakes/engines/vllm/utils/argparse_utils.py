import fake_road


class FlexibleArgumentParser:
    command = "vllm serve"

    def parse_args(self, words):
        return fake_road.engine_args(self.command, words)
