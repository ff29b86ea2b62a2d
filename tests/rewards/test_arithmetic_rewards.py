from trl_bridge.rewards import answer_reward, closeness_reward


def test_answer_reward_pays_the_answer_alone():
    completions = ["46", " 46\n", "46 or 47", "046", "", [{"role": "assistant", "content": "46"}]]
    assert answer_reward(completions, ["46"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_closeness_reward_falls_with_the_distance_of_the_first_integer():
    completions = ["7", "is 8", "-5", "none", "6 then 7", [{"role": "assistant", "content": "9"}]]
    assert closeness_reward(completions, ["7"] * 6) == [1.0, 1 / 2, 1 / 13, 0.0, 1 / 2, 1 / 3]
